"""What the operations refuse, and which backend a call takes."""

import pytest
import torch

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("wrong", [-1, 4])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_index_out_of_range_is_refused(backend: str, wrong: int) -> None:
    """On the CPU always, on a GPU within checked()."""
    x, visible = torch.randn(1, 4, 8, device=DEVICE), torch.tensor([[1, wrong]], dtype=torch.int32, device=DEVICE)
    one, none = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    video = torch.zeros(1, 2, 8, 16, 3, dtype=torch.uint8, device=DEVICE)
    for call in (
        lambda: kernels.patch_gather(video, visible, patch_size=8, backend=backend),
        lambda: kernels.patch_gather(
            video.repeat(1, 2, 1, 1, 1), visible, patch_size=8, tubelet_size=2, backend=backend
        ),
        lambda: kernels.token_gather(x, visible, backend=backend),
        lambda: kernels.gather_norm(x, visible, one, none, backend=backend),
        lambda: kernels.align_loss(x[None, :, :2], x[None], one[None], none[None], visible=visible, backend=backend),
    ):
        with kernels.checked(), pytest.raises(IndexError, match=r"\[0, 4\)"):
            call()


def test_more_clips_than_a_grid_has_are_refused() -> None:
    student = torch.zeros(1, 65536, 1, 8, device=DEVICE)
    affine = torch.ones(1, 8, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
    with pytest.raises(ValueError, match="65536 clips; a launch takes at most 65535"):
        kernels.align_loss(student, student, *affine, backend="triton")
    with pytest.raises(ValueError, match="65536 clips; a launch takes at most 65535"):
        video = torch.zeros(65536, 1, 8, 8, 3, dtype=torch.uint8, device=DEVICE)
        kernels.patch_gather(
            video, torch.zeros(65536, 1, dtype=torch.int32, device=DEVICE), patch_size=8, backend="triton"
        )
    assert kernels.align_loss(student, student, *affine, backend="reference") == 2


def test_values_are_read_where_that_is_free_or_asked_for() -> None:
    from kernels._launch import values_can_be_checked

    elsewhere = torch.zeros(2, device="meta")  # stands for a GPU
    assert values_can_be_checked(torch.zeros(2)) and not values_can_be_checked(torch.zeros(0))
    assert not values_can_be_checked(elsewhere)
    with kernels.checked():
        assert values_can_be_checked(elsewhere)
    assert not values_can_be_checked(elsewhere)


def test_force_backend_decides_within_its_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels._launch import use_triton

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(1)
    with kernels.force_backend("triton"):
        assert use_triton("auto", x) and not use_triton("reference", x)
        with kernels.force_backend("reference"):
            assert not use_triton("auto", x)
        assert use_triton("auto", x)
    assert not use_triton("auto", x)
    with pytest.raises(ValueError, match="backend is 'fast'"), kernels.force_backend("fast"):
        pass


def test_errors_name_value_and_limit() -> None:
    x, visible = torch.randn(1, 4, 8), torch.tensor([[1, 4]], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"\[0, 4\)"):
        kernels.token_gather(x, visible)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        kernels.token_gather(x, visible[:, :1], backend="fast")
    with pytest.raises(ValueError, match="not divisible"):
        kernels.patch_gather(torch.zeros(1, 1, 20, 16, 3, dtype=torch.uint8), visible, patch_size=16)
    frames, corner = torch.zeros(1, 1, 20, 40, 3, dtype=torch.uint8), torch.tensor([[5, 8]])
    with pytest.raises(IndexError, match=r"to \(21, 24\), outside frames of 20 x 40"):
        kernels.patch_gather(frames, visible[:, :0], patch_size=16, origin=corner, crop_size=(16, 16))
    with pytest.raises(ValueError, match="origin and crop_size together"):
        kernels.patch_gather(frames, visible[:, :0], patch_size=16, origin=corner)
    with pytest.raises(IndexError, match=r"from \(-1, 8\)"):
        kernels.patch_gather(
            frames, visible[:, :0], patch_size=16, origin=corner - 6 * (corner < 8), crop_size=(16, 16)
        )
    with pytest.raises(IndexError, match=r"\[-1, 0\]"):
        kernels.token_gather(x, visible % 4 - 1)
    with pytest.raises(ValueError, match=r"of shape \(1, n\)"):
        kernels.token_gather(x, visible.repeat(2, 1) % 4)
    student, affine = torch.zeros(1, 1, 3, 8), (torch.ones(1, 8), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="does not match student"):
        kernels.align_loss(student, torch.zeros(1, 1, 2, 8), *affine)
    with pytest.raises(ValueError, match="2 indices a clip, student 3 rows"):
        kernels.align_loss(student, torch.zeros(1, 1, 9, 8), *affine, visible=visible)
    with pytest.raises(ValueError, match="limit of 4096"):
        kernels.sample_visible(torch.ones(1, 4097), 2, torch.tensor([0]))
    with pytest.raises(ValueError, match="1025 tokens in a row exceed the limit of 1024"):
        kernels.semantic_mask(torch.zeros(1, 1, 8), torch.zeros(1, 1, 1026, 8), 0, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"must be \(R, H, D\)"):
        kernels.semantic_mask(torch.zeros(1, 1, 8), torch.zeros(1, 1, 1, 8), 0, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"must be \(B, Nq, H, D\)"):
        kernels.attention(torch.zeros(1, 2, 1, 8), *torch.zeros(2, 1, 2, 1, 4))
    with pytest.raises(ValueError, match=r"\[0, 4\]"):
        kernels.sample_visible(torch.ones(1, 4), 5, torch.tensor([0]))
    with pytest.raises(ValueError, match="must be int64"):
        kernels.sample_visible(torch.ones(1, 4), 2, torch.tensor([0], dtype=torch.int32))


def test_triton_on_a_cpu_tensor_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a CUDA tensor"):
        kernels.token_gather(torch.randn(1, 4, 8), torch.zeros(1, 1, dtype=torch.int32), backend="triton")


def test_a_second_derivative_is_refused_on_the_triton_backend() -> None:
    x = torch.randn(1, 4, 8, device=DEVICE, requires_grad=True)
    visible = torch.tensor([[1, 3]], dtype=torch.int32, device=DEVICE)
    weight, bias = torch.ones(1, 8, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
    for backend in ("reference", "triton"):
        rows = kernels.token_gather(x, visible, backend=backend)
        loss = kernels.align_loss(rows[None], torch.randn(1, 1, 2, 8, device=DEVICE), weight, bias, backend=backend)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        if backend == "reference":
            assert torch.autograd.grad(first.square().sum(), x)[0].isfinite().all()
        else:
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(first.square().sum(), x)
