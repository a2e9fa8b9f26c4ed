"""What a replica imports of vLLM's surroundings, in a process of its own, because imports last."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

IMPORTS = """
import sys
from serve_app.reranker.engine import import_vllm_without_compiler, leave_out_unused
leave_out_unused(on_gpu=False)
import_vllm_without_compiler()
import vllm.v1.engine.llm_engine
compiler = [name for name in sys.modules if name.startswith("torch._inductor.codegen")]
assert not compiler, compiler
import torch
assert torch.compile(lambda x: x + 1)(1) == 2
import torch._inductor.lowering
assert torch._inductor.lowering.lowerings
"""


def test_an_engine_that_compiles_nothing_starts_without_the_compiler_and_whoever_needs_it_gets_it() -> None:
    environment = {**os.environ, "VLLM_CONFIGURE_LOGGING": "0"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
