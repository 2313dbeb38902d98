"""The tiny decoder is its author's, and a block is decoded while the next one is made."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longlive_rag.cli import main
from longlive_rag.generation import pipeline as pipeline_module
from longlive_rag.generation.tiny_decoder import TinyDecoder, tiny_layers
from longlive_rag.models import CausalWanModel
from support.stopped_videos import BLOCKS, FACTS, make_video, tiny_pipeline
from support.tiny_wan import TRACES, save_original_folder

TESTS = Path(__file__).parents[1]


def parameters() -> Any:
    spec = importlib.util.spec_from_file_location("golden_parameters", TESTS / "golden" / "params.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARAMETERS = parameters()


def layers(channels: int = 16, patch: int = 1) -> torch.nn.Sequential:
    made = tiny_layers(channels, patch)
    PARAMETERS.fill(made, 5)
    with torch.no_grad():
        made.get_parameter("22.bias").add_(0.5)  # so that few pixels are black
    return made


ONE_ROUNDING = 1
"""Of 8 bits: convolutions over another number of frames may sum in another order, and a pixel lie between two steps."""


def furthest(pictures: Tensor, others: Tensor) -> int:
    return int((pictures.int() - others.int()).abs().max())


@pytest.fixture(scope="module")
def decoder() -> TinyDecoder:
    return TinyDecoder(layers())


@pytest.mark.parametrize("name", ["taew2_1", "taew2_2"])
def test_it_makes_the_recorded_pictures(name: str) -> None:
    """Recorded with the author's own code; see traces/README.md."""
    with safe_open(TRACES / f"{name}.safetensors", "pt") as file:
        expected, metadata = file.get_tensor("frames"), file.metadata()
    channels, patch = int(metadata["channels"]), int(metadata["patch"])
    made = TinyDecoder(layers(channels, patch))
    assert (made.channels, made.spatial_factor, made.temporal_factor) == (channels, 8 * patch, 4)
    frames = made.decode(PARAMETERS.tensor(5, "latents", ((len(expected) + 3) // 4, channels, 2, 3)))
    assert frames.shape == expected.shape and frames.dtype == torch.uint8
    # Half a step of 8 bits is the rounding.
    assert (frames.float() - 255 * expected).abs().max() < 0.51


@pytest.mark.parametrize("blocks", [[3, 3, 1], [1] * 7])
def test_streaming_gives_the_pictures_of_decoding_at_once(decoder: TinyDecoder, blocks: list[int]) -> None:
    latents = torch.randn(7, 16, 2, 3, generator=torch.Generator().manual_seed(0))
    decoder.reset()
    whole = decoder.decode(latents)
    assert len(whole) == decoder.pictures(7) == 25
    decoder.reset()
    parts = []
    for part in latents.split(blocks):
        decoder.offload()
        decoder.restore()
        parts.append(decoder.decode(part))
    assert furthest(torch.cat(parts), whole) <= ONE_ROUNDING


def test_a_picture_depends_on_no_more_latent_frames_than_said(decoder: TinyDecoder) -> None:
    """A video that goes on is decoded from as many frames before as that."""
    latents = torch.randn(10, 16, 2, 3, generator=torch.Generator().manual_seed(0))
    decoder.reset()
    whole = decoder.decode(latents)[-4:]
    for before, same in ((decoder.reach, True), (2, False)):
        decoder.reset()
        assert (furthest(decoder.decode(latents[-1 - before :])[-4:], whole) <= ONE_ROUNDING) is same
    with pytest.raises(ValueError, match=r"latents must be \[F, 16, H, W\], got \[1, 48, 2, 3\]"):
        decoder.decode(torch.zeros(1, 48, 2, 3))


def published(folder: Path, **changes: Tensor | None) -> Path:
    """The author's file: decoder and encoder, and a layer trained for more pictures than are made."""
    state: dict[str, Tensor] = {f"decoder.{name}": tensor for name, tensor in layers().state_dict().items()}
    state["encoder.0.weight"] = torch.zeros(64, 3, 3, 3)
    state["decoder.7.conv.weight"] = torch.cat([torch.zeros(256, 256, 1, 1), state["decoder.7.conv.weight"]])
    for name, tensor in changes.items():
        state.pop(name.replace("_", "."))
        if tensor is not None:
            state[name.replace("_", ".")] = tensor
    path = folder / "taew2_1.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def test_the_authors_file_is_loaded_whole_or_not_at_all(decoder: TinyDecoder, tmp_path: Path) -> None:
    latents = torch.randn(2, 16, 2, 3)
    decoder.reset()
    expected = decoder.decode(latents)
    loaded = TinyDecoder.from_file(published(tmp_path), device="cpu", dtype=torch.float32)
    assert torch.equal(loaded.decode(latents), expected)
    for changes, message in (
        ({"decoder_1_weight": None}, "holds no tiny decoder for Wan: it lacks decoder.1.weight"),
        ({"decoder_3_conv_0_weight": None}, "lacks 3.conv.0.weight"),
        ({"decoder_8_weight": torch.zeros(2, 2, 3, 3)}, r"8.weight must be \[128, 256, 3, 3\].*got \[2, 2, 3, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            TinyDecoder.from_file(published(tmp_path, **changes), device="cpu", dtype=torch.float32)


def test_generate_with_the_tiny_decoder(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    save_original_folder(tmp_path / "wan")
    torch.manual_seed(0)
    model = CausalWanModel(
        dim=128, ffn_dim=64, freq_dim=32, text_dim=24, num_heads=1, num_layers=1
    )  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "model.pt")
    command = [
        "generate", "--backbone", "wan", "--wan-dir", str(tmp_path / "wan"), "--checkpoint", str(tmp_path / "model.pt"),
        "--output", str(tmp_path / "videos"), "--prompt", "a cat", "--seconds", "2", "--fps", "4", "--height", "32",
        "--width", "48",
    ]  # fmt: skip
    assert main([*command, "--decoder", "tiny"]) == 2
    assert "needs taew2_1.safetensors or taew2_1.pth (about 45 MB) in " in capsys.readouterr().err
    published(tmp_path / "wan")
    assert main([*command, "--decoder", "tiny"]) == 0
    assert (tmp_path / "videos" / "0000-a-cat.mp4").is_file()
    assert main(command) == 2
    assert "was made with other settings (decoder 'tiny', now None)" in capsys.readouterr().err


def test_a_block_is_decoded_while_the_next_one_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, one at a time, and never before it is made."""
    pipeline = tiny_pipeline()
    making, decoding = [threading.Event() for _ in range(BLOCKS + 1)], threading.Lock()
    making[BLOCKS].set()
    decoded: list[int] = []
    stream, decode = pipeline_module.stream, pipeline.decoder.decode
    made: list[Tensor] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        blocks = stream(*args, **kwargs)
        for index in range(BLOCKS):
            making[index].set()
            block = next(blocks)
            made.append(block.latents[0].clone())
            yield block

    def waiting(latents: Tensor) -> Tensor:
        assert decoding.acquire(blocking=False), "two blocks are decoded at once"
        index = len(decoded)
        # Would never come, if the next block were made only after this one is decoded.
        assert making[index + 1].wait(timeout=60)
        assert torch.equal(latents, made[index])
        decoded.append(index)
        pictures = decode(latents)
        decoding.release()
        return pictures

    expected = make_video(tiny_pipeline(), tmp_path / "expected")
    monkeypatch.setattr(pipeline_module, "stream", noting)
    monkeypatch.setattr(pipeline.decoder, "decode", waiting)
    assert make_video(pipeline, tmp_path / "beside") == expected
    assert decoded == list(range(BLOCKS))


def test_a_decoder_that_fails_ends_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline()

    def failing(latents: Tensor) -> Tensor:
        raise MemoryError("no room for pictures")

    monkeypatch.setattr(pipeline.decoder, "decode", failing)
    with pytest.raises(MemoryError, match="no room for pictures"):
        pipeline.generate(torch.ones(4, 8), tmp_path / "cat.mp4", FACTS)
    assert not (tmp_path / "cat.mp4").exists()
