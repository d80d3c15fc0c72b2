"""What a module's forward does with its children, found without running or touching the module.

A shadow is a copy of the model that shares nothing with it: parameters and buffers are on the meta device,
python state is deep-copied. torch.fx runs the forward of the shadow with symbolic tensors and every child as
a leaf. A branch on a symbolic value is followed both ways, so that what holds on every path holds for every
input.
"""

from __future__ import annotations

import copy
import dis
import inspect
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    def __init__(self, model: nn.Module, opaque: type[nn.Module]) -> None:
        self._model, self._opaque = model, opaque
        self._copy: nn.Module | None = None
        self._whole_failed = ""
        self._glances: dict[str, Traces] = {}

    def glance(self, name: str) -> Traces:
        """One path only (eval, arguments at their defaults): enough to see what a forward touches."""
        if name not in self._glances:
            self._glances[name] = self._trace(name, _glance)
        return self._glances[name]

    def explore(self, name: str) -> Traces:
        """Every path, in training and in eval, each defaulted argument both given and left out."""
        return self._trace(name, _explore)

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


def _meta_copy(model: nn.Module, opaque: type[nn.Module]) -> nn.Module:
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
    _run(traces, training=False, given=frozenset(), decisions=[], explore=False)


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
