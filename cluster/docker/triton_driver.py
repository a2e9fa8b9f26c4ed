"""Compiles Triton's driver.c to the file named, as Triton itself would when it first meets a GPU."""

import shutil
import sys

from triton.backends.nvidia import driver
from triton.runtime.build import compile_so_from_file

made = compile_so_from_file(
    f"{driver.dirname}/driver.c", "cuda_utils", driver.library_dirs(), driver.include_dirs, driver.libraries
)
shutil.copy(made, sys.argv[1])
