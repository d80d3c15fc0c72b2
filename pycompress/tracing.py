"""What a module's forward does with its children, found without running or touching the module.

A shadow is a copy of the model that shares nothing with it: parameters and buffers are on the meta device,
python state is deep-copied. torch.fx runs the forward of the shadow with symbolic tensors and every child as
a leaf. A branch on a symbolic value is followed both ways, so that what holds on every path holds for every
input. Methods other than forward are never run (they may write files); of these only the names in their code
are known.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import itertools
import random
import re
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

MAX_BRANCHES = 32  # along one path; a loop on a symbolic value ends here
MAX_PATHS = 128  # through one forward, over all its modes


@dataclass
class Traces:
    """The graphs of the paths through one forward; `failure` says why a path could not be followed."""

    root: nn.Module
    graphs: list[fx.Graph] = field(default_factory=list)
    failure: str = ""

    def nodes(self, op: str) -> Iterator[fx.Node]:
        return (node for graph in self.graphs for node in graph.nodes if node.op == op)

    def calls(self, name: str) -> list[fx.Node]:
        """Every call of the child `name`."""
        return [node for node in self.nodes("call_module") if node.target == name]

    def passes_on(self, name: str) -> bool:
        """Whether the child itself (not a call of it) is used as a value, as in self.run(self.fc, x)."""
        return any(node.target == name for node in self.nodes("get_attr"))

    def reads(self, name: str) -> bool:
        """Whether the parameter is used, be it only for its dtype, as in x.to(self.fc.weight.dtype)."""
        hits = (node for node in self.nodes("get_attr") if node.target == name)
        return any(node.users or "dtype_read" in node.meta for node in hits)


class Shadow:
    """Traces the modules of a model, by qualified name, on a copy made when it is first needed."""

    def __init__(self, model: nn.Module, opaque: type[nn.Module] | tuple[type[nn.Module], ...]) -> None:
        self._model, self._opaque = model, opaque
        self._copy: nn.Module | None = None
        self._whole_failed = ""
        self._glances: dict[str, Traces] = {}
        self._explored: dict[str, Traces] = {}

    def glance(self, name: str) -> Traces:
        """Four paths only (eval; defaulted arguments left out or given; branches all skipped or all taken)."""
        if name not in self._glances:
            self._glances[name] = self._trace(name, _glance)
        return self._glances[name]

    def explore(self, name: str) -> Traces:
        """Every path, in training and in eval, each defaulted argument both given and left out."""
        if name not in self._explored:
            self._explored[name] = self._trace(name, _explore)
        return self._explored[name]

    def _trace(self, name: str, follow: Callable[[Traces], None]) -> Traces:
        try:
            module = self._module(name)
        except Exception as error:  # whatever a user's __deepcopy__ raises; reported as the failure
            return Traces(nn.Module(), failure=f"it cannot be copied ({_first_line(error)})")
        traces = Traces(module)
        if "forward" in self._model.get_submodule(name).__dict__:
            traces.failure = "its forward was replaced on the instance"
            return traces
        with _isolated():
            follow(traces)
        return traces

    def _module(self, name: str) -> nn.Module:
        if self._copy is None and not self._whole_failed:
            try:
                self._copy = _meta_copy(self._model, self._opaque)
            except Exception as error:  # something far from `name` may be what cannot be copied
                self._whole_failed = _first_line(error)
        if self._copy is None:
            return _meta_copy(self._model.get_submodule(name), self._opaque)
        return self._copy.get_submodule(name)


def _meta_copy(model: nn.Module, opaque: type[nn.Module] | tuple[type[nn.Module], ...]) -> nn.Module:
    """A deep copy without the weights: parameters and buffers on meta, `opaque` modules as placeholders."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, opaque):
            memo[id(module)] = nn.Identity()
            continue
        for key, value in (*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()):
            if isinstance(value, torch.Tensor) and not nn.parameter.is_lazy(value):
                empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
                is_parameter = module._parameters.get(key) is value
                memo[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


@contextmanager
def _isolated() -> Iterator[None]:
    """Tracing runs user code once more than the user asked: no random number is spent, no warning shown."""
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(python_state)


def _glance(traces: Traces) -> None:
    choices = _argument_choices(type(traces.root))
    for given in dict.fromkeys((frozenset[str](), max(choices, key=len))):
        for decisions in ([], [True] * MAX_BRANCHES):
            _run(traces, training=False, given=given, decisions=decisions, explore=False)


def _explore(traces: Traces) -> None:
    for training in (True, False):
        for given in _argument_choices(type(traces.root)):
            decisions: list[bool] | None = []
            while decisions is not None:
                if len(traces.graphs) == MAX_PATHS:
                    traces.failure = f"it has more than {MAX_PATHS} paths"
                    return
                taken = _run(traces, training=training, given=given, decisions=decisions, explore=True)
                if traces.failure:
                    return
                decisions = _next_path(taken)


def _next_path(taken: list[bool]) -> list[bool] | None:
    """Depth first: the last branch that went False goes True; None when all have gone both ways."""
    while taken and taken[-1]:
        taken = taken[:-1]
    return [*taken[:-1], True] if taken else None


def _argument_choices(module_type: type[nn.Module]) -> list[frozenset[str]]:
    """Which defaulted arguments are given a symbolic value; all subsets of three, all/none/each of more."""
    parameters = inspect.signature(module_type.forward).parameters.values()
    optional = [p.name for p in parameters if p.default is not p.empty]
    if len(optional) <= 3:
        sizes = range(len(optional) + 1)
        return [frozenset(c) for n in sizes for c in itertools.combinations(optional, n)]
    return [frozenset(), frozenset(optional), *(frozenset((name,)) for name in optional)]


def _run(traces: Traces, *, training: bool, given: frozenset[str], decisions: list[bool], explore: bool) -> list[bool]:
    """Follow one path, add its graph to `traces`, and return the branches that it took."""
    for module in traces.root.modules():
        module.training = training
    tracer = _PathTracer(given, decisions, torch.float32 if training else torch.float16)
    try:
        with torch.set_grad_enabled(training):
            tracer.trace(traces.root)
    except Exception as error:  # any error of the user's forward; it is the result, not hidden
        if not (explore and _raised_by_forward(error)):
            traces.failure = _first_line(error)
    if hasattr(tracer, "graph"):
        traces.graphs.append(tracer.graph)
    return tracer.decisions


def _raised_by_forward(error: Exception) -> bool:
    """Whether a `raise` or `assert` of the forward ended the path, as it would end a real call."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    in_torch = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"
    opcode = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    return not in_torch and dis.opname[opcode] == "RAISE_VARARGS"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


class _Value(fx.Proxy):
    """A symbolic tensor with a real dtype, because forwards call torch.finfo(x.dtype)."""

    @property
    def dtype(self) -> torch.dtype:
        tracer = self.tracer
        assert isinstance(tracer, _PathTracer)
        self.node.meta["dtype_read"] = True
        return tracer.dtype


class _PathTracer(fx.Tracer):
    proxy_buffer_attributes = True  # a buffer update is then refused instead of running

    def __init__(self, given: frozenset[str], decisions: list[bool], dtype: torch.dtype) -> None:
        super().__init__()
        self.given, self.decisions, self.dtype = given, list(decisions), dtype
        self._position = 0

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # torch.fx intercepts every call in the process: let through a module held outside the tree, and those
        # that another thread is running meanwhile.
        if self.submodule_paths is None or m not in self.submodule_paths:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self._position == len(self.decisions):
            if self._position == MAX_BRANCHES:
                raise RuntimeError(f"more than {MAX_BRANCHES} branches in a row depend on the input")
            self.decisions.append(False)
        self._position += 1
        return self.decisions[self._position - 1]

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Required arguments and those in `given` are symbolic, the others keep their default."""
        args: list[Any] = [self.root]
        kwargs: dict[str, Any] = {}
        for p in list(inspect.signature(root_fn).parameters.values())[1:]:
            left_out = p.default is not p.empty and p.name not in self.given
            # Of a bare *inputs one is given; after other arguments it stays empty.
            if left_out or p.kind is p.VAR_KEYWORD or (p.kind is p.VAR_POSITIONAL and len(args) > 1):
                continue
            value = self.create_proxy("placeholder", p.name, (), {})
            if p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty):
                kwargs[p.name] = value
            else:
                args.append(value)

        def forward(*args: Any) -> Any:
            return root_fn(*args, **kwargs)

        return forward, args


# --- methods that are not run: the names in their code ---

# Methods that fill, save, load or print weights name a layer without computing with it.
_BOOKKEEPING = re.compile(r"(^|_)(init|initiali[sz]e|reset|state_dict|repr|getstate|setstate|deepcopy)(_|$)")
_WALKERS = frozenset(("children", "named_children", "_modules"))
_TENSORS = frozenset(  # of a layer, of nn.MultiheadAttention too
    ("weight", "bias", "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
)


@dataclass(frozen=True)
class Method:
    name: str
    label: str  # Class.name
    names: frozenset[str]  # attributes, globals and string constants, those of inner functions included
    tensors_of: frozenset[str]  # each `a` whose x.a.weight, x.a.bias or x.a[0].weight it reads; '' for x[0].weight
    int8_tensors_of: frozenset[str]  # the same, read by code that asks for torch.int8 before, as T5's does

    def may_reach(self, path: str) -> bool:
        """Whether it could get at the module `path` below its own; a plain index could be anything."""
        attribute = last_attribute(path)
        return not attribute or attribute in self.names or not _WALKERS.isdisjoint(self.names)


def last_attribute(path: str) -> str:
    """What code that reaches `path` has to name: 'net' of 'net.0'; empty for '0' (self[0])."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), "")


def methods_of(module: nn.Module) -> list[Method]:
    """The methods that may compute something, forward included; those of torch's own classes are known."""
    found = [method for kind in type(module).__mro__ for method in _methods_of_class(kind)]
    bound = ((k, v) for k, v in module.__dict__.items() if k == "forward" or isinstance(v, types.MethodType))
    return found + [_method(key, f"the instance's {key}", value) for key, value in bound]


@functools.lru_cache(maxsize=512)
def _methods_of_class(kind: type) -> tuple[Method, ...]:
    if kind is object or kind.__module__.startswith("torch.nn."):
        return ()
    only_forward = kind.__module__.startswith("torch.")
    return tuple(
        _method(name, f"{kind.__name__}.{name}", value)
        for name, value in vars(kind).items()
        if (name == "forward" or not only_forward) and not _BOOKKEEPING.search(name) and any(_functions(value))
    )


def _method(name: str, label: str, value: object) -> Method:
    codes = [code for function in _functions(value) for code in _codes(function.__code__)]
    names = frozenset(name for code in codes for name in _names_in(code))
    tensors: dict[bool, set[str]] = {False: set(), True: set()}
    for code in codes:
        tensors["int8" in code.co_names].update(_tensors_in(code))
    return Method(name, label, names, frozenset(tensors[False]), frozenset(tensors[True]))


def _functions(value: object, depth: int = 5) -> Iterator[types.FunctionType]:
    """The functions behind a method, a property or a decorated one."""
    parts: list[object] = []
    if isinstance(value, types.FunctionType):
        yield value
        parts = [getattr(value, "__wrapped__", None)]
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                parts.append(cell.cell_contents)
    elif isinstance(value, property):
        parts = [value.fget]
    elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
        parts = [value.__func__]
    elif isinstance(value, (functools.partial, functools.partialmethod, functools.cached_property)):
        parts = [value.func]
    for part in parts if depth else ():
        yield from _functions(part, depth - 1)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        yield from (text for text in (const if isinstance(const, tuple) else (const,)) if isinstance(text, str))


def _tensors_in(code: types.CodeType) -> Iterator[str]:
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        if step.opname == "LOAD_ATTR" and step.argval in _TENSORS:
            at = i - 1
            while at > 2 and (steps[at].opname == "BINARY_SUBSCR" or steps[at].argrepr == "[]"):
                at -= 2  # the subscript and its index
            if steps[at].opname == "LOAD_ATTR":
                yield str(steps[at].argval)
            elif at < i - 1:
                yield ""  # self[0].weight
