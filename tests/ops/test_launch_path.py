"""From an op to the driver without a GPU: real cuda-core on a driver that hands every launch to the emulation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from streaming_rwkv.ops.build import build_cpp, kernel_source

HERE = Path(__file__).parent
SOURCES = kernel_source("layer/layer.cu").parents[1]


class Launched(NamedTuple):
    """What launch_path_worker.py saw."""

    launches: list[dict[str, Any]]
    errors: dict[str, dict[str, float]]  # of outputs and gradients, against the definition in float64
    kernels: list[list[str]]  # source and name, in all machine code that was loaded
    refusal: str


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    pytest.importorskip("cuda.core", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("driver")
    name = "libcuda.so.1"
    shutil.copy(build_cpp(HERE / "cuda_driver.cpp", flags=[f"-Wl,-soname,{name}"]), folder / name)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "launch_path_worker.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Launched(**json.loads(done.stdout))


def test_every_kernel_is_launched(launched: Launched) -> None:
    loaded = {(source, kernel) for source, kernel in launched.kernels}
    assert {(x["source"], x["kernel"]) for x in launched.launches} == loaded
    # Machine code was loaded for every source, and for every kernel that a source names.
    text = {str(path.relative_to(SOURCES)): path.read_text() for path in SOURCES.rglob("*.cu")}
    assert {source for source, _ in loaded} == set(text)
    written = {
        (source, kernel)
        for source, content in text.items()
        for kernel in re.findall(r"__global__ void __launch_bounds__\(.*\)\s+(\w+)\(int64", content)
    }
    assert len(written) == 13
    assert written <= loaded


def test_results_are_those_of_the_definitions(launched: Launched) -> None:
    """An argument of another order, type or number gives other numbers."""
    wrong = {
        (case, name): error
        for case, found in launched.errors.items()
        for name, error in found.items()
        # float32 as in test_layer.py and test_kernels.py; bfloat16 rounds inputs of products, products and results.
        if not error <= (1e-5 if "float32" in case else 4e-3)
    }
    assert wrong == {}
    assert len(launched.errors) == 18


def test_arguments_have_the_size_that_the_machine_code_takes(launched: Launched) -> None:
    """An integer of Python becomes 8 bytes, and every parameter of our kernels has 8."""
    assert {size for x in launched.launches for size in x["arguments"]} == {8}
    counts = {x["kernel"]: len(x["arguments"]) for x in launched.launches}
    assert (counts["wkv7_forward"], counts["wkv7_backward"], counts["wkv7_chunked_gradients"]) == (16, 23, 22)


def test_grids_blocks_and_shared_memory(launched: Launched) -> None:
    def shape(case: str, kernel: str) -> tuple[list[int], list[int], int]:
        found = [x for x in launched.launches if (x["case"], x["kernel"]) == (case, kernel)]
        assert len(found) == 1
        return found[0]["grid"], found[0]["block"], found[0]["shared_bytes"]

    # 2 heads of 5 documents and of the padding; of 3 documents, and 2 or 4 blocks for each chain.
    assert shape("wkv7 step by step, float32", "wkv7_forward") == ([12, 1, 1], [128, 1, 1], 0)
    assert shape("wkv7 in chunks, wide", "wkv7_chunked_forward_wide") == ([8, 1, 1], [64, 1, 1], 54528)
    assert shape("wkv7 in chunks, narrow", "wkv7_chunked_backward_narrow") == ([8, 1, 1], [128, 1, 1], 92672)
    assert shape("wkv7 in chunks, split_in_two", "wkv7_chunked_forward_split_in_two") == (
        [16, 1, 1], [160, 1, 1], 126720
    )  # fmt: skip
    assert shape("wkv7 in chunks, split_in_four", "wkv7_chunked_backward_split_in_four") == (
        [32, 1, 1], [128, 1, 1], 108288
    )  # fmt: skip
    # 90 // 32 + 3 groups, and one more that clears the padding.
    assert shape("wkv7 in chunks, wide", "wkv7_chunked_gradients") == ([12, 1, 1], [128, 1, 1], 75008)
    # 26 and 18 tokens in tiles of 16, 128 channels by fours; 8 rows of sums of 128, 64 at a time.
    assert shape("six mixes of a pack, bfloat16", "norm_mix_forward") == ([2, 1, 1], [32, 1, 1], 0)
    assert shape("six mixes of a pack, bfloat16", "sum_blocks") == ([16, 1, 1], [512, 1, 1], 0)
    assert shape("loss, bfloat16", "cross_entropy") == ([12, 1, 1], [32, 1, 1], 0)


def test_each_launch_is_on_the_current_device_and_stream_of_its_thread(launched: Launched) -> None:
    """float32 runs in the main thread, on device 0 and its default stream; bfloat16 in another, on device 1."""
    places = defaultdict(set)
    for x in launched.launches:
        places["float32" in x["case"]].add((x["device"], x["stream"], x["thread"]))
    assert places == {True: {(0, 0, False)}, False: {(1, 0x5555, True)}}


def test_a_device_with_too_little_shared_memory(launched: Launched) -> None:
    assert launched.refusal == (
        "wkv7_chunked_forward_split_in_two: sm_90 does not give a block 126720 bytes of shared memory "
        "(CUDA_ERROR_INVALID_VALUE); use a GPU that does (A100, H100 and newer), or float32 inputs"
    )
