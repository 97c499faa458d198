"""Loading weights: what loads, and what must be refused without running it."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from clipval import library, model, weights
from clipval.errors import BackendUnavailable, InputError, UsageError
from clipval.towers import TEXT, VISION, towers

from .conftest import CONFIG


def load(file):
    return model.load(CONFIG, weights.find_weights(CONFIG, str(file)), towers())


def text_embedding(loaded):
    import torch

    with torch.no_grad():
        return model.encoder(loaded, TEXT)(loaded.tokenize(["a red circle"])).numpy()


def test_a_state_dict_loads(seeded, tmp_path):
    import torch

    file = tmp_path / "plain.pt"
    torch.save(seeded.module.state_dict(), file)
    assert np.array_equal(text_embedding(load(file)), text_embedding(seeded))


def test_a_training_checkpoint_loads(seeded, tmp_path):
    import torch

    file = tmp_path / "epoch.pt"
    state = {f"module.{name}": value for name, value in seeded.module.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, file)
    assert np.array_equal(text_embedding(load(file)), text_embedding(seeded))


def test_safetensors_load(seeded, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "plain.safetensors"
    save_file({name: value.contiguous() for name, value in seeded.module.state_dict().items()}, str(file))
    assert np.array_equal(text_embedding(load(file)), text_embedding(seeded))


def test_random_weights_are_the_same_every_time(seeded):
    again = model.load(CONFIG, weights.find_weights(CONFIG, weights.RANDOM), towers())
    assert np.array_equal(text_embedding(again), text_embedding(seeded))


def test_an_open_clip_that_does_not_know_its_version(monkeypatch):
    """2.20.0, the recipe's own, has no `__version__`."""
    wanted = weights.find_weights(CONFIG, weights.RANDOM)
    monkeypatch.delattr(library.import_open_clip(), "__version__", raising=False)
    assert weights.find_weights(CONFIG, weights.RANDOM) == wanted
    with pytest.raises(InputError, match=r"no such architecture in open_clip \d+\.\d+"):
        weights.find_weights("ViT-B-33", "random")


class Harm:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_malicious_pickle_does_not_run(tmp_path):
    file, harmed = tmp_path / "evil.pt", tmp_path / "harmed"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"state_dict": Harm(harmed)}, protocol=2))
        archive.writestr("evil/version", "3\n")
        archive.writestr("evil/byteorder", "little")
    with pytest.raises(InputError, match="evil.pt"):
        load(file)
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Harm(harmed), protocol=2))
    with pytest.raises(InputError, match="old.pt"):
        load(tmp_path / "old.pt")
    assert not harmed.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_off_checkpoint_is_one_line(tmp_path, share):
    whole = Path(CONFIG.replace(".json", ".pt")).read_bytes()
    file = tmp_path / "cut.pt"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match="cut.pt: .*damaged or cut off") as caught:
        load(file)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_named(seeded, tmp_path):
    import torch

    state = dict(seeded.module.state_dict())
    state["text_projection"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not of architecture shapes-vit"):
        load(tmp_path / "other.pt")


def test_missing_weights_say_what_to_get():
    with pytest.raises(InputError, match="known tags: .*laion2b_s34b_b79k"):
        weights.find_weights("ViT-B-32", "no_such_tag")
    with pytest.raises(InputError, match="no such architecture"):
        weights.find_weights("ViT-B-33", "random")
    for name in ("ViT-B/32", "vit_b_32"):
        with pytest.raises(InputError, match=r"did you mean ViT-B-32\?"):
            library.architecture(name)
    with pytest.raises(InputError, match=r"did you mean laion2b_s34b_b79k\?"):
        weights.find_weights("ViT-B-32", "laion2B-s34B-b79K")
    with pytest.raises(InputError, match="no such file"):
        library.architecture("missing.json")


def test_other_sizes_than_the_contract_are_refused():
    found = weights.find_weights(CONFIG, weights.RANDOM)
    with pytest.raises(InputError, match="set image_size"):
        model.load(CONFIG, found, towers(image_size=336))
    with pytest.raises(InputError, match="set embed_dim"):
        model.load(CONFIG, found, towers(width=768))


def test_tokens_of_another_shape_are_refused():
    with pytest.raises(UsageError, match="tokenizer gave"):
        model.check_tokens(np.zeros((2, 64), np.int64), TEXT)


def test_encoders_give_unit_rows(seeded):
    import torch

    rows = torch.rand(2, *VISION.row_shape)
    with torch.no_grad():
        found = model.encoder(seeded, VISION)(rows).numpy()
    assert found.shape == (2, VISION.width)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_padding_behind_the_end_does_not_matter(seeded):
    import torch

    tokens = seeded.tokenize(["a red circle"])
    other = tokens.clone()
    other[0, 10:] = 7  # behind the end of text, which the causal mask hides
    with torch.no_grad():
        one, two = (model.encoder(seeded, TEXT)(rows).numpy() for rows in (tokens, other))
    assert np.allclose(one, two, atol=1e-6)


def test_coca_takes_the_tokens_of_its_config(tmp_path):
    """open_clip 2.20 tokenizes to 77 and drops the last, newer ones to 76: the same embedding."""
    import torch

    blocks = {"width": 64, "layers": 1}
    text = {**blocks, "heads": 2, "context_length": 12}
    config = {
        "embed_dim": 32,
        "vision_cfg": {**blocks, "image_size": 32, "patch_size": 16, "head_width": 32, "output_tokens": True},
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": text,
        "custom_text": True,
    }
    (tmp_path / "small-coca.json").write_text(json.dumps(config), encoding="utf-8")
    name = str(tmp_path / "small-coca.json")
    loaded = model.load(name, weights.find_weights(name, weights.RANDOM), library.sizes(name))
    tokens = loaded.tokenize(["a red circle", "word " * 20])
    assert tokens.shape == (2, 12)
    assert tokens[1, -1] == 49407  # the end of a caption that was cut
    with torch.no_grad():
        found = model.encoder(loaded, library.sizes(name)["text"])(tokens)
        whole, _ = loaded.module.text(tokens)  # class token behind all twelve
    assert np.allclose(found, torch.nn.functional.normalize(whole, dim=-1), atol=1e-6)


@pytest.fixture
def away(monkeypatch):
    """A hub that cannot be reached, whose client says so in a class of its own."""

    def get_tokenizer(arch):
        raise OSError("We couldn't connect to the hub to load this file")

    monkeypatch.setattr(library.import_open_clip(), "get_tokenizer", get_tokenizer)
    model._loaded_tokenizer.cache_clear()
    yield "roberta-ViT-B-32"
    model._loaded_tokenizer.cache_clear()


def test_a_tokenizer_that_cannot_be_fetched_names_its_source(away, monkeypatch):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: "found")
    with pytest.raises(InputError, match="files of 'roberta-base' .* are neither in the hub's cache nor") as error:
        model.tokenizer(away)(["a"])
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_package_is_named_with_the_way_to_get_it(away, monkeypatch):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'clipval\[transformers\]'"):
        model.tokenizer(away)(["a"])


def test_a_key_that_open_clip_does_not_know_is_no_missing_package(tmp_path):
    """The tokenizer is from a hub that is not here; the cause is the config all the same."""
    text = {"context_length": 32, "vocab_size": 1000, "hf_tokenizer_name": "nobody/none", "width": 64, "heads": 2}
    vision = {"image_size": 64, "layers": 1, "width": 64, "head_width": 32, "patch_size": 32}
    config = {"embed_dim": 48, "custom_text": True, "of_tomorrow": 1, "vision_cfg": vision, "text_cfg": text}
    file = tmp_path / "tomorrows.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    found = weights.find_weights(str(file), weights.RANDOM)
    with pytest.raises(InputError, match=r"open_clip \S+ cannot build it \(.*of_tomorrow"):
        model.load(str(file), found, library.sizes(str(file)))
