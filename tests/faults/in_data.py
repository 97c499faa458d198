"""Faults of the data on its way in: pictures, captions, tokens, ids, and a model that is wrong for every backend."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Callable

import msgspec
import numpy as np

from clipval import chain, datasets, model, preprocess, retrieval
from clipval.datasets import shapes
from clipval.gates import artifacts
from tests.faults.table import REBUILD, fault


def transformed(change: Callable[[Any], Any], after: bool = True) -> None:
    """Change pixels inside the model's own transform, so that every stage sees the same wrong ones."""
    real = model.load

    def load(*arguments: Any) -> Any:
        loaded = real(*arguments)
        whole = loaded.transform
        wrong = (lambda image: change(whole(image))) if after else (lambda image: whole(change(image)))
        return loaded._replace(transform=wrong)

    model.load = load  # type: ignore[assignment]


@fault("BGR for RGB", "prepared/data/vision", "|pixel - the spec's|", "sample")
def bgr() -> None:
    transformed(lambda pixels: pixels.flip(0))


@fault("mean and std of another model", "prepared/data/vision", "|pixel - the spec's|", "sample")
def other_mean() -> None:
    transformed(lambda pixels: pixels * 0.54 - 0.03)


@fault("resize without antialias", "prepared/data/vision", "|pixel - the spec's|", "sample")
def no_antialias() -> None:
    def change(image: Any) -> Any:
        from PIL import Image

        short = min(image.size)
        size = tuple(int(224 * edge / short) for edge in image.size)
        return image.resize(size, Image.Resampling.NEAREST)

    transformed(change, after=False)


def stated(**change: Any) -> None:
    """Build the transform otherwise than it is stated."""
    real = model.build_transform
    model.build_transform = lambda said, size: real(msgspec.structs.replace(said, **change), size)


@fault("bilinear for bicubic", "prepared/data/vision", "|pixel - the spec's|", "sample")
def bilinear() -> None:
    stated(interpolation="bilinear")


@fault("squashed for cropped", "prepared/data/vision", "|pixel - the spec's|", "sample")
def squashed() -> None:
    stated(resize_mode="squash")


@fault("padded for cropped", "prepared/data/vision", "|pixel - the spec's|", "sample")
def padded() -> None:
    stated(resize_mode="longest")


@fault("other weights under the name of the spec's", "golden/pytorch/text", "cosine of probe inputs", arguments=REBUILD)
def other_weights_by_name() -> None:
    real = model.checkpoint.read

    def read(file: Any) -> Any:
        state = real(file)
        return {**state, "text_projection": state["text_projection"].flip(0)}

    model.checkpoint.read = read


@fault("one tensor of the checkpoint from an earlier epoch", "golden/pytorch/vision", "cosine of probe inputs",
       arguments=REBUILD)  # fmt: skip
def one_tensor_of_another_epoch() -> None:
    real = model.checkpoint.read

    def read(file: Any) -> Any:
        state = real(file)
        name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
        return {**state, name: state[name] * 0.9}

    model.checkpoint.read = read


@fault("crop off by one pixel", "prepared/data/vision", "|pixel - the spec's|", "sample")
def crop_off_by_one() -> None:
    transformed(lambda pixels: pixels.roll(1, dims=2))


@fault("images mirrored", "prepared/data/vision", "|pixel - the spec's|", "sample")
def mirrored() -> None:
    transformed(lambda pixels: pixels.flip(2))


@fault("constant images", "prepared/data/vision", "|pixel - the spec's|", "distinct/pytorch/vision")
def constant_images() -> None:
    transformed(lambda pixels: pixels * 0)


def prepared_tokens(change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the tokens that preprocessing writes, not those that the gate holds them to."""
    real = preprocess.tokens
    assert artifacts.tokens is real

    def tokens(*arguments: Any) -> np.ndarray:
        return change(real(*arguments))

    preprocess.tokens = tokens  # type: ignore[assignment]


@fault("end of text lost from the tokens", "prepared/data/text", "tokens that differ", "sample")
def end_of_text_lost() -> None:
    prepared_tokens(lambda rows: np.where(rows == 49407, 0, rows))


@fault("one caption's tokens replaced by another's", "prepared/data/text", "tokens that differ", "sample")
def one_caption_replaced() -> None:
    prepared_tokens(lambda rows: np.concatenate([rows[:9], rows[10:11], rows[10:]]))


def dataset(change: Callable[[Any], Any]) -> None:
    """Change what the reader gives on."""
    real = datasets.read

    def read(*arguments: Any, **more: Any) -> Any:
        return change(real(*arguments, **more))

    datasets.read = read  # type: ignore[assignment]


@fault("captions shuffled by one", "recall/pytorch/image_retrieval_recall@5", "queries")
def captions_shuffled() -> None:
    dataset(lambda data: dataclasses.replace(data, captions=(*data.captions[1:], data.captions[0])))


@fault("captions cut at the first comma", "prepared/data/text", "captions that differ")
def captions_cut() -> None:
    dataset(lambda data: dataclasses.replace(data, captions=tuple(one.split(",")[0] for one in data.captions)))


@fault("each image's file is the next one's", "recall/pytorch/text_retrieval_recall@5", "queries")
def images_shifted() -> None:
    dataset(lambda data: dataclasses.replace(data, image_paths=(*data.image_paths[1:], data.image_paths[0])))


@fault("two captions with one id", "values/pytorch/text", "different ids")
def duplicate_ids() -> None:
    def change(data: Any) -> Any:
        object.__setattr__(data, "caption_ids", (data.caption_ids[1], *data.caption_ids[1:]))
        return data

    dataset(change)


@fault("one image's file is another one's", "prepared/data/vision", "duplicate images", "sample")
def one_image_replaced() -> None:
    dataset(lambda data: dataclasses.replace(data, image_paths=(data.image_paths[1], *data.image_paths[1:])))


@fault("the files of two images exchanged", "prepared/data/vision", "|picture - drawn|", "sample")
def two_images_exchanged() -> None:
    def change(data: Any) -> Any:
        one, other, *rest = data.image_paths
        return dataclasses.replace(data, image_paths=(other, one, *rest))

    dataset(change)


def pictures(change: Callable[[Any], Any]) -> None:
    """Replace the first picture's file by a changed one of the same name, before anything is made of it."""

    def changed(data: Any) -> Any:
        from PIL import Image

        path = Path(tempfile.mkdtemp()) / data.image_paths[0].name
        change(Image.open(data.image_paths[0]).convert("RGB")).save(path, quality=90)
        return dataclasses.replace(data, image_paths=(path, *data.image_paths[1:]))

    dataset(changed)


@fault("one picture replaced by another drawing", "prepared/data/vision", "|picture - drawn|", "sample")
def one_picture_replaced() -> None:
    pictures(lambda image: shapes.scenes(shapes.SEED_TRAIN, 1)[0][0].resize(image.size))


@fault("a tenth of one picture's height painted over", "prepared/data/vision", "|picture - drawn|", "sample")
def one_picture_painted_over() -> None:
    def change(image: Any) -> Any:
        image.paste((90, 90, 90), (0, 0, image.width, image.height // 10))
        return image

    pictures(change)


def ranked(keep: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rank only the captions that `keep` says by their images' indices, and only the images that these have."""
    real = chain.evaluate

    def evaluate(ids: Any, images: Any, caption_ids: Any, captions: Any, owner: np.ndarray) -> Any:
        kept = np.flatnonzero(keep(owner))
        left, owners = np.unique(owner[kept], return_inverse=True)
        return real(
            tuple(ids[n] for n in left), images[left], tuple(caption_ids[n] for n in kept), captions[kept], owners
        )

    chain.evaluate = evaluate  # type: ignore[assignment]


@fault("one image in thirty left out of retrieval", "recall/pytorch/text_retrieval_recall@5", "58 queries among 290")
def fewer_images() -> None:
    ranked(lambda owner: owner % 30 != 7)


@fault("the first caption of each image left out", "recall/onnx/text_retrieval_recall@5", "60 queries among 240")
def fewer_captions() -> None:
    ranked(lambda owner: np.append(False, owner[1:] == owner[:-1]))


@fault("the captions of two images exchanged", "prepared/data/text", "captions that differ")
def captions_exchanged() -> None:
    def change(data: Any) -> Any:
        all_of_them = data.captions
        return dataclasses.replace(data, captions=(*all_of_them[5:10], *all_of_them[:5], *all_of_them[10:]))

    dataset(change)


@fault("two images have each other's name in the annotations", "prepared/data/text", "or their images")
def images_renamed() -> None:
    def change(data: Any) -> Any:
        order = [1, 0, *range(2, len(data.image_ids))]  # their captions stay where they are
        images = {name: tuple(getattr(data, name)[n] for n in order) for name in ("image_ids", "image_paths")}
        owners = [images["image_ids"][n] for n in data.image_of_caption]
        ids = tuple(f"{owner}_{name.rpartition('_')[2]}" for owner, name in zip(owners, data.caption_ids))
        return dataclasses.replace(data, **images, caption_ids=ids)

    dataset(change)


@fault("one caption counted to the next image", "prepared/data/text", "or their images")
def caption_of_the_next_image() -> None:
    def change(data: Any) -> Any:
        owner = data.image_of_caption.copy()
        owner[14] = owner[15]  # both images keep some
        ids = (*data.caption_ids[:14], f"{data.image_ids[owner[15]]}_5", *data.caption_ids[15:])
        return dataclasses.replace(data, image_of_caption=owner, caption_ids=ids)

    dataset(change)


@fault("a copy of the data that lacks the last image", "ERROR: data", "the spec says", "incomplete copy", code=4)
def incomplete_copy() -> None:
    def change(data: Any) -> Any:
        images = {name: getattr(data, name)[:-1] for name in ("image_ids", "image_paths")}
        captions = {name: getattr(data, name)[:-5] for name in ("captions", "caption_ids", "image_of_caption")}
        return dataclasses.replace(data, **images, **captions)

    dataset(change)


@fault("tokens cut to 76", "prepared/data/text", "expected <i8 (1, 77)")
def tokens_cut() -> None:
    prepared_tokens(lambda rows: rows[:, :76].copy())


@fault("a prepared array changed after it was written", "prepared/data/vision", "|pixel - transform's|", "sample")
def prepared_array_changed() -> None:
    real = preprocess.prepare

    def prepare(*arguments: Any) -> Any:
        made = real(*arguments)
        file = min((made.folder / "images").iterdir())
        array = np.load(file)
        array[0, 0, 5, 5] += 1e-3
        np.save(file, array)
        return made

    preprocess.prepare = prepare  # type: ignore[assignment]


@fault("BGR for RGB where a picture is decoded", "recall/pytorch/text_retrieval_recall@5", "queries",
       arguments=REBUILD)  # fmt: skip
def decoded_as_bgr() -> None:
    from PIL import Image

    real = preprocess.open_rgb
    preprocess.open_rgb = lambda path: Image.merge("RGB", real(path).split()[::-1])  # type: ignore[attr-defined]


def loaded(change: Callable[[Any], Any]) -> None:
    """Change the model where it is loaded, so that the reference is wrong in the same way."""
    real = model.load
    model.load = lambda *arguments: change(real(*arguments))  # type: ignore[assignment]


@fault("the tokenizer loses the last word", "recall/pytorch/image_retrieval_recall@5", "queries", arguments=REBUILD)
def last_word_lost() -> None:
    def change(one: Any) -> Any:
        return one._replace(tokenize=lambda texts: one.tokenize([text.rpartition(" ")[0] or text for text in texts]))

    loaded(change)


@fault("the tokenizer loses the end of text", "distinct/pytorch/text", "inputs with one embedding", arguments=REBUILD)
def tokenizer_without_end() -> None:
    def change(one: Any) -> Any:
        return one._replace(tokenize=lambda texts: one.tokenize(texts).masked_fill(one.tokenize(texts) == 49407, 0))

    loaded(change)


@fault("attention mask lost in the model itself", "recall/pytorch/image_retrieval_recall@5", "queries",
       arguments=REBUILD)  # fmt: skip
def mask_lost_everywhere() -> None:
    def change(one: Any) -> Any:
        one.module.attn_mask.zero_()
        return one

    loaded(change)


@fault("QuickGELU for GELU in the model itself", "golden/pytorch/vision", "cosine of probe inputs", "worst samples",
       arguments=REBUILD)  # fmt: skip
def quick_gelu_everywhere() -> None:
    def change(one: Any) -> Any:
        import torch
        from open_clip.transformer import QuickGELU

        for module in list(one.module.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.GELU):
                    setattr(module, name, QuickGELU())
        return one

    loaded(change)


@fault("GELU by its tanh formula in the model itself", "golden/pytorch/text", "cosine of probe inputs",
       arguments=REBUILD)  # fmt: skip
def tanh_gelu_everywhere() -> None:
    def change(one: Any) -> Any:
        import torch

        for module in one.module.modules():
            if isinstance(module, torch.nn.GELU):
                module.approximate = "tanh"
        return one

    loaded(change)


@fault("weights of one matrix of the model itself in bf16", "golden/pytorch/vision", "cosine of probe inputs",
       arguments=REBUILD)  # fmt: skip
def bf16_matrix_everywhere() -> None:
    def change(one: Any) -> Any:
        weight = one.module.visual.transformer.resblocks[1].mlp.c_fc.weight
        weight.data = weight.data.bfloat16().float()
        return one

    loaded(change)


@fault("8 bits for one matrix of the model itself", "golden/pytorch/text", "cosine of probe inputs", arguments=REBUILD)
def int8_matrix_everywhere() -> None:
    def change(one: Any) -> Any:
        weight = one.module.transformer.resblocks[1].mlp.c_proj.weight
        step = weight.data.abs().max() / 127
        weight.data = (weight.data / step).round() * step
        return one

    loaded(change)


@fault("noise of 5 % on the weights of the model itself", "golden/pytorch/text", "cosine of probe inputs",
       arguments=REBUILD)  # fmt: skip
def noise_everywhere() -> None:
    loaded(lambda one: noisy(one, 0.05))


def noisy(one: model.Model, size: float) -> model.Model:
    """Normal noise on each weight of a model, a share of it."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for weight in one.module.parameters():
            weight *= 1 + size * torch.randn_like(weight)
    return one


@fault("mirrored by the library that decodes", "golden/pytorch/vision", "cosine of the data's files", arguments=REBUILD)
def mirrored_where_decoded() -> None:
    from PIL import Image, ImageOps

    real = Image.open
    Image.open = lambda *given, **named: ImageOps.mirror(real(*given, **named))


@fault("one candidate more counts than recall@k says", "recall/pytorch/image_retrieval_recall@1", "queries")
def one_candidate_more() -> None:
    real = retrieval.Direction.hits
    retrieval.Direction.hits = lambda self, k: real(self, k + 1)  # type: ignore[method-assign]
