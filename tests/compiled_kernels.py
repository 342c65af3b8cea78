"""The CUDA kernels, compiled by g++ and run on the CPU (see ``emulator/host_kernels.h``)."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgetrack.runtime import device_state

ROOT = Path(__file__).parents[1]
FRAME_CU = ROOT / "edgetrack" / "runtime" / "kernels" / "frame.cu"
STRUCTS = ("Window", "Source", "Target", "Rules", "Decision", "Result")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off")
# What the driver would do, and how the compiler lays out a struct's fields.
HARNESS = """
extern "C" {
int num_conditions;
unsigned long long handles[4], conditions[4];
void cudaGraphSetConditional(unsigned long long handle, unsigned value) {
  handles[num_conditions % 4] = handle;
  conditions[num_conditions++ % 4] = value;
}
}
template <typename Field>
int kind_of() {
  using Item = std::remove_all_extents_t<Field>;
  if (std::is_class_v<Item>) return 'V';
  return std::is_floating_point_v<Item> ? 'f' : std::is_signed_v<Item> ? 'i' : 'u';
}
"""


class CompiledKernels:
    """Launches kernels by name, to their end.

    Args:
        folder: Where to compile.
    """

    def __init__(self, folder: Path) -> None:
        header = ROOT / "tests" / "emulator" / "host_kernels.h"
        lines = [f'#include "{header}"', f'#include "{FRAME_CU}"', "EXPORT_FRAME_KERNELS", HARNESS]
        lines += [_layout_table(name) for name in STRUCTS]
        code, library = folder / "kernels.cpp", folder / "kernels.so"
        code.write_text("\n".join(lines), "utf-8")
        command = [_gxx(), *FLAGS, str(code), "-o", str(library)]
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(library))

    def launch(
        self,
        name: str,
        *arguments: npt.NDArray[Any] | np.generic,
        grid: tuple[int, int, int] = (1, 1, 1),
        block: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        """Run a kernel; an array stands for its address, a NumPy scalar for its value."""
        values = [
            np.array(a.ctypes.data, np.uint64) if isinstance(a, np.ndarray) else np.array(a)
            for a in arguments
        ]
        assert [v.nbytes for v in values] == self.parameter_sizes(name)
        ctypes.c_int.in_dll(self._library, "num_conditions").value = 0
        pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        three = ctypes.c_uint * 3
        launched = self._library.emulated_kernel_launch(
            name.encode(), three(*grid), three(*block), pointers
        )
        assert launched == 1

    def parameter_sizes(self, name: str) -> list[int] | None:
        """Bytes of each parameter of a kernel; ``None`` where there is none of that name."""
        sizes = (ctypes.c_uint * 16)()
        count = self._library.emulated_kernel_parameters(name.encode(), sizes)
        return None if count < 0 else list(sizes[:count])

    @property
    def conditions(self) -> dict[int, int]:
        """Handles and values of the conditions that the last kernel set."""
        count = ctypes.c_int.in_dll(self._library, "num_conditions").value
        four = ctypes.c_ulonglong * 4
        names, values = (four.in_dll(self._library, name) for name in ("handles", "conditions"))
        return dict(zip(names[:count], values[:count], strict=True))

    def layout(self, struct: str) -> tuple[int, dict[str, tuple[int, int, str]]]:
        """Size of a struct, and offset, size and NumPy's kind of each field that its dtype has."""
        names = _dtype(struct).names or ()
        table = (ctypes.c_int * (1 + 3 * len(names))).in_dll(self._library, f"layout_of_{struct}")
        fields = {
            name: (table[1 + 3 * k], table[2 + 3 * k], chr(table[3 + 3 * k]))
            for k, name in enumerate(names)
        }
        return table[0], fields


def _gxx() -> str:
    path = shutil.which("g++")
    if path is None:
        pytest.skip("needs g++ to run the kernels on the CPU")
    return path


def _dtype(struct: str) -> np.dtype[Any]:
    dtype: np.dtype[Any] = getattr(device_state, struct.upper())
    return dtype


def _layout_table(struct: str) -> str:
    rows = [f"(int)sizeof({struct})"]
    for name in _dtype(struct).names or ():
        member = f"{struct}::{name}"
        rows.append(f"(int)offsetof({struct}, {name}), (int)sizeof({member})")
        rows.append(f"kind_of<decltype({member})>()")
    return (
        f'extern "C" int layout_of_{struct}[];\nint layout_of_{struct}[] = {{{", ".join(rows)}}};'
    )
