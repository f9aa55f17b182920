"""The CUDA kernels on a GPU, where there is one: step by step for float32, in chunks for bfloat16."""

from __future__ import annotations

import pytest
import torch

from streaming_rwkv.ops import cuda_chunked, wkv7
from streaming_rwkv.ops.cuda_chunked import SHAPES, WIDE, Shape
from streaming_rwkv.ops.testing import Case, Decays, errors, make_case, run, run_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(case: Case) -> Case:
    """All on the GPU but cu_seqlens, which a loader leaves on the CPU."""
    inputs, initial_state, cu_seqlens, dy, dfinal_state = case
    return Case([x.cuda() for x in inputs], initial_state.cuda(), cu_seqlens, dy.cuda(), dfinal_state.cuda())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_definition(dtype: torch.dtype) -> None:
    case = make_case([1, 15, 16, 17, 31, 0, 300, 2048], dtype=dtype, padding=3)
    found = {name: x.cpu() for name, x in run(wkv7, on_gpu(case)).items()}
    for name, error in errors(found, run_reference(case)).items():
        if dtype == torch.bfloat16:
            assert error <= 2.5e-3, name
        else:
            assert error <= (1e-6 if name in ("y", "final_state") else 1e-5), name


@pytest.mark.parametrize("decays", ["whole range", "all fastest", "all slowest"])
def test_in_chunks_it_equals_the_definition_for_all_decays(decays: Decays) -> None:
    case = make_case([1, 33, 0, 2047, 4096], heads=3, decays=decays, dtype=torch.bfloat16, padding=40)
    found = {name: x.cpu() for name, x in run(wkv7, on_gpu(case)).items()}
    for name, error in errors(found, run_reference(case)).items():
        assert error <= {"y": 2.0e-3, "final_state": 5e-4}.get(name, 2.5e-3), name


@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda shape: shape.name)
def test_the_shape_of_the_launch_changes_no_bit(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    case = on_gpu(make_case([1, 17, 0, 300, 1000], dtype=torch.bfloat16, padding=3))
    monkeypatch.setattr(cuda_chunked, "_shape", lambda *_: WIDE)
    expected = run(wkv7, case)
    monkeypatch.setattr(cuda_chunked, "_shape", lambda *_: shape)
    found = run(wkv7, case)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_wherever_the_bounds_lie_and_in_a_pack_or_alone(dtype: torch.dtype) -> None:
    case = on_gpu(make_case([40, 17], dtype=dtype))
    found, again = run(wkv7, case), run(wkv7, case._replace(cu_seqlens=case.cu_seqlens.cuda()))
    assert all(torch.equal(found[name], again[name]) for name in found)
    alone = wkv7(*(x[:, 40:] for x in case.inputs), initial_state=case.initial_state[1:])[0]
    assert torch.equal(alone, found["y"][:, 40:])


# torch warns of this once a process.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_never_waits_for_the_device(dtype: torch.dtype) -> None:
    case = on_gpu(make_case([40, 17], dtype=dtype))
    on_device = case._replace(cu_seqlens=case.cu_seqlens.cuda())  # a copy that waits
    run(wkv7, on_device)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(wkv7, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_current_stream_is_used(dtype: torch.dtype) -> None:
    case = on_gpu(make_case([300], dtype=dtype))
    expected = run(wkv7, case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(wkv7, case)
    stream.synchronize()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
