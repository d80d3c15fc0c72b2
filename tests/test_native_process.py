"""A process without torch, one that imports torch later, and what ``import pycompress`` imports."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pycompress
from pycompress import _native, native
from pycompress.nn import Int4Linear, Int8Linear, SparseLinear
from tests.test_native import as_numpy
from tests.test_package import run_python

WITHOUT_TORCH = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "typer", "rich", "pydantic", "yaml", "jinja2", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def test_without_torch(isa: str, tmp_path: Path) -> None:
    """A saved model is loaded and run where torch cannot be imported; the results are those of its modules."""
    model = nn.Sequential(
        Int8Linear.from_float(nn.Linear(50, 40), "dynamic", "gelu"),
        SparseLinear.from_dense(nn.Linear(40, 30), torch.rand(30, 40) > 0.7, dtype="int8", format="index"),
        Int4Linear.from_float(nn.Linear(30, 20), group_size=16),
        Int8Linear.from_float(nn.Linear(20, 10), "weight_only"),
    )
    pycompress.save_model(model, tmp_path / "model.safetensors")
    x = torch.randn(13, 50)
    np.save(tmp_path / "x.npy", x.numpy())
    run_python(
        WITHOUT_TORCH + "import numpy as np\nfrom pycompress import native\n"
        f"assert native.selected_isa() == {isa!r}\n"
        "y = np.load('x.npy')\n"
        "layers = native.load_layers('model.safetensors')\n"
        "for layer in layers.values(): y = layer(y)\n"
        "np.save('y.npy', y)\n"
        "assert sys.modules.get('torch') is None\n",
        tmp_path,
    )
    with torch.no_grad():
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), as_numpy(model(x)))


def test_what_needs_torch_says_so(tmp_path: Path) -> None:
    run_python(
        WITHOUT_TORCH + "import pycompress\n"
        "assert 'quantize_' in dir(pycompress) and pycompress.__version__\n"
        "from pycompress import native\n"
        "assert native.Int8Linear and pycompress.native is native\n"
        "for name in ('nn', 'quantize_', 'ops'):\n"
        "    try: getattr(pycompress, name)\n"
        "    except ModuleNotFoundError as error: assert \"'torch'\" in str(error), error\n"
        "    else: raise AssertionError(name)\n"
        "try: pycompress.nope\n"
        "except AttributeError as error: assert 'nope' in str(error)\n",
        tmp_path,
    )


def test_a_missing_openmp_library_is_named(tmp_path: Path) -> None:
    run_python(
        "import sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Linker(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pycompress._C':\n"
        "            raise ImportError('libgomp.so.1: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Linker())\n"
        "try: import pycompress.native\n"
        "except ImportError as error: text = str(error)\n"
        "assert 'libgomp.so.1: cannot' in text and 'apt install libgomp1' in text\n",
        tmp_path,
    )


def test_import_pycompress_imports_little(tmp_path: Path) -> None:
    run_python(
        "import sys, pycompress\n"
        "heavy = {'torch', 'numpy', 'typer', 'rich', 'pydantic', 'yaml', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import pycompress.native\n"
        "assert 'torch' not in sys.modules\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('torch').loader.path\n"  # found, and not imported, as transformers does
        "assert 'torch' not in sys.modules\n",
        tmp_path,
    )


@pytest.mark.parametrize("torch_first", [False, True])
def test_with_torch(tmp_path: Path, torch_first: bool) -> None:
    """Whichever is imported first: one OpenMP library and its threads in the process, both sides compute the same, and
    ``import pycompress`` is enough for torch.export.load to find the operators.
    """
    exported, x = Int8Linear.from_float(nn.Linear(20, 10)).eval(), torch.randn(3, 20)
    torch.export.save(torch.export.export(exported, (x,)), tmp_path / "program.pt2")
    torch.save((x, exported(x).detach()), tmp_path / "values.pt")
    imports = ["import pycompress\n", "import pycompress.native\n", "import torch\n"]
    libraries = run_python(
        "".join(imports[::-1] if torch_first else imports) + "import numpy as np, os, sys\n"
        "program = torch.export.load('program.pt2').module()\n"
        "x, y = torch.load('values.pt')\n"
        "assert torch.equal(program(x), y)\n"
        "assert torch.__spec__.loader is torch.__loader__\n"
        "assert not [f for f in sys.meta_path if type(f).__module__.startswith('pycompress')]\n"
        "from pycompress import native, nn\n"
        "torch.set_num_threads(2); native.set_num_threads(2)\n"
        "linear = torch.nn.Linear(600, 900).requires_grad_(False)\n"
        "x = torch.randn(300, 600)\n"
        "module = nn.Int8Linear.from_float(linear)\n"
        "layer = native.Int8Linear.from_float(linear.weight.numpy(), linear.bias.numpy())\n"
        "linear(x)\n"
        "assert np.array_equal(module(x).numpy(), layer(x.numpy()))\n"
        "threads = len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 0\n"
        "layer(x.numpy()); linear(x)\n"
        "assert threads in (0, len(os.listdir('/proc/self/task')))\n"
        "maps = open('/proc/self/maps') if threads else ()\n"
        "for path in {line.split()[-1] for line in maps if '.so' in line}: print(path)\n",
        tmp_path,
    ).split()
    openmp = [p for p in libraries if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))]
    assert len(openmp) == 1 or not libraries, openmp


def test_names(tmp_path: Path) -> None:
    """Every public name and submodule, however it is asked for; a function keeps the name that its module has too."""
    names = [name for name in pycompress.__all__ if name != "__version__"]
    run_python(
        "import pycompress, types\n"
        f"names = {names!r}\n"
        "assert set(names) <= set(dir(pycompress))\n"
        "import pycompress.sensitivity_measure\n"  # imports pycompress.sensitivity, the module
        "assert callable(pycompress.sensitivity) and not isinstance(pycompress.sensitivity, types.ModuleType)\n"
        "from pycompress import sensitivity, calibrate, calibration, convert, gpu\n"
        "assert sensitivity is pycompress.sensitivity and calibration.calibrate is calibrate\n"
        "import pycompress.sensitivity as again\n"
        "assert again is sensitivity\n"
        "for name in names: exec(f'from pycompress import {name}')\n"
        "assert not hasattr(pycompress, '_absent')\n",
        tmp_path,
    )


def test_threads_that_begin_at_both_ends(tmp_path: Path) -> None:
    """Importing torch goes on to pycompress.ops, which imports torch: no thread waits for the other one."""
    run_python(
        "import threading, pycompress\n"
        "assert not hasattr(pycompress, 'a.b')\n"
        "failed, gate = [], threading.Barrier(6)\n"
        "def run(name):\n"
        "    gate.wait()\n"
        "    try: getattr(pycompress if name else __import__('torch').ops.pycompress, name or 'int8_linear')\n"
        "    except Exception as error: failed.append((name, error))\n"
        "names = ['ops', '', 'quantize_', 'nn', '', 'sensitivity']\n"
        "threads = [threading.Thread(target=run, args=(name,)) for name in names]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "assert not failed, failed\n",
        tmp_path,
    )


def test_torch_is_whole_where_the_operators_are_not(tmp_path: Path) -> None:
    run_python(
        "import sys, warnings, pycompress\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Broken(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pycompress._C': raise ImportError('libgomp.so.1: cannot open')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    import torch\n"
        "assert torch.ones(2).sum() == 2 and any('not registered' in str(w.message) for w in caught), caught\n"
        "try: pycompress.quantize_\n"
        "except ImportError as error: assert 'libgomp' in str(error), error\n"
        "else: raise AssertionError\n",
        tmp_path,
    )


def test_threads_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from pycompress import native; print(native.get_num_threads())"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert int(run_python(code, tmp_path)) == len(os.sched_getaffinity(0))
    for value, expected in (("3", 3), ("5,2", 5), ("none", len(os.sched_getaffinity(0)))):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert int(run_python(code, tmp_path)) == expected


def test_isas_are_those_of_the_torch_side(tmp_path: Path) -> None:
    assert native.available_isas() == _native.available_isas()
    code = WITHOUT_TORCH + "import json\nfrom pycompress import native\nprint(json.dumps(native.available_isas()))"
    assert json.loads(run_python(code, tmp_path)) == _native.available_isas()
