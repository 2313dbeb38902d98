"""Text encoder and VAE from Wan's folders: both layouts, the very frames of decoding at once, missing files named."""

from __future__ import annotations

import pytest
import torch

from support.tiny_wan import save_diffusers_folder, save_original_folder, trace

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from longlive_rag.generation.text_encoder import PromptEncoder, clean_prompt
from longlive_rag.generation.wan_files import find_checkpoint, find_wan_files
from longlive_rag.generation.wan_vae import StreamingDecoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    save_original_folder(folder / "original")
    save_diffusers_folder(folder / "diffusers")
    return {"original": folder / "original", "diffusers": folder / "diffusers"}


@pytest.fixture(params=["original", "diffusers"])
def files(request, folders):
    return find_wan_files(folders[request.param])


def encoder_of(files):
    return PromptEncoder(files, device="cpu", dtype=torch.float32)


def decoder_of(files):
    return StreamingDecoder.from_files(files, device="cpu", dtype=torch.float32)


def test_text_encoder_agrees_with_wans_own(files):
    _, recorded = trace("wan_text_encoder", "t5.")
    encoder = encoder_of(files)
    for ids, mask, expected in zip(recorded["ids"], recorded["mask"], recorded["embeddings"], strict=True):
        length = int(mask.sum())
        with torch.no_grad():
            found = encoder.encoder(ids[None, :length]).last_hidden_state[0]
        assert (found - expected[:length]).norm() / expected[:length].norm() < 1e-5


def test_prompts_are_cleaned_ended_and_cut(files):
    encoder = encoder_of(files)
    plain = encoder.encode("a panda")
    assert plain.shape == (3, encoder.width)
    assert torch.equal(encoder.encode("  a \n\t panda "), plain)
    assert not torch.equal(encoder.encode("a cat"), plain)
    assert encoder.encode("a panda " * 400).shape == (512, encoder.width)


def test_prompt_cleaning():
    assert clean_prompt(" caf\u00c3\u00a9 &amp;amp; tea\n") == "caf\u00e9 & tea"


def test_decoder_agrees_with_wans_own(files):
    _, recorded = trace("wan_vae", "vae.")
    frames = decoder_of(files).decode(recorded["latents"])
    assert frames.dtype == torch.uint8 and frames.shape == (13, 24, 32, 3)
    # One step of 8 bits, for rounding.
    assert (frames.float() - (recorded["frames"] + 1) * 127.5).abs().max() < 0.51


@pytest.mark.parametrize("blocks", [[7], [3, 3, 1], [1] * 7])
def test_streaming_gives_the_frames_of_decoding_at_once(files, blocks):
    torch.manual_seed(0)
    latents = torch.randn(7, 16, 4, 6)
    decoder = decoder_of(files)
    whole = decoder.decode(latents)
    vae = decoder.vae
    z = latents.transpose(0, 1)[None] * torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    z = z + torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        expected = vae.decode(z).sample[0].permute(1, 2, 3, 0)
    # diffusers applies the first convolution to all frames at once, in other shapes: up to the rounding to 8 bits.
    assert (whole.float() - (expected + 1) * 127.5).abs().max() < 0.51

    for _ in range(2):  # a second video must begin afresh
        decoder.reset()
        pieces = [decoder.decode(part) for part in latents.split(blocks)]
        assert [len(piece) for piece in pieces] == [4 * blocks[0] - 3, *(4 * block for block in blocks[1:])]
        assert torch.equal(torch.cat(pieces), whole)


def test_decoder_survives_offloading_and_others_use_of_the_vae(files):
    latents = torch.randn(4, 16, 4, 6)
    decoder = decoder_of(files)
    whole = decoder.decode(latents)
    decoder.reset()
    first = decoder.decode(latents[:2])
    decoder.offload()
    decoder.restore()
    decoder.vae.decode(torch.randn(1, 16, 2, 4, 6))
    assert torch.equal(torch.cat([first, decoder.decode(latents[2:])]), whole)


def test_wrong_latents_are_refused(folders):
    with pytest.raises(ValueError, match=r"latents must be \[F, 16, H, W\], got \[2, 4, 4, 6\]"):
        decoder_of(find_wan_files(folders["original"])).decode(torch.randn(2, 4, 4, 6))


def test_missing_and_extra_weights_are_named(tmp_path):
    save_original_folder(tmp_path)
    files = find_wan_files(tmp_path)
    for path, load, name, converted in (
        (files.text_encoder, encoder_of, "blocks.1.attn.k.weight", "encoder.block.1.layer.0.SelfAttention.k.weight"),
        (files.vae, decoder_of, "decoder.conv1.bias", "decoder.conv_in.bias"),
    ):
        state = torch.load(path)
        torch.save({key: value for key, value in state.items() if key != name}, path)
        with pytest.raises(ValueError, match=f"{path.name} lacks {converted}"):
            load(files)
        torch.save({**state, "surplus.weight": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match=f"{path.name} holds surplus.weight"):
            load(files)
        torch.save({"something": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match=f"{path.name} holds no"):
            load(files)


def test_missing_files_are_told_with_source_and_size(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"does not exist.*umt5.*11\.4 GB.*Wan2\.1_VAE\.pth \(0\.5 GB\).*hf download"
    ):
        find_wan_files(tmp_path / "none")
    save_original_folder(tmp_path)
    (tmp_path / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(FileNotFoundError) as error:
        find_wan_files(tmp_path)
    assert "lacks Wan2.1_VAE.pth (0.5 GB) from https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B: hf download" in str(
        error.value
    )
    assert "umt5" not in str(error.value)
    (tmp_path / "other" / "vae").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"lacks text_encoder \(22\.7 GB\).*2\.1-T2V-1\.3B-Diffusers"):
        find_wan_files(tmp_path / "other")


def test_missing_checkpoint_is_told_with_source_and_size(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no\.pt does not exist.*self_forcing_dmd\.pt \(about 5\.7 GB\).*gdhe17"
    ):
        find_checkpoint("self-forcing", tmp_path / "no.pt")
    with pytest.raises(ValueError, match=r"got none; longlive takes models/longlive_base\.pt"):
        find_checkpoint("longlive", None)
    with pytest.raises(ValueError, match=r"got none$"):
        find_checkpoint("wan", None)
