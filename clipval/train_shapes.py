"""Train the small CLIP of the spec `shapes` on drawn scenes: python -m clipval.train_shapes --save FILE.

Seeds, sizes and steps are the defaults below; about eight minutes on four CPU cores. Test images and
captions come from another seed and are never trained on. The checkpoint is a plain state_dict in float16; token rows
that no caption uses are made of rows that captions use, so that each id has its own row and the file compresses well.
"""

from __future__ import annotations

import argparse
import random
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Sequence, Tuple

import numpy as np

from clipval.datasets import shapes
from clipval.library import import_open_clip
from clipval.model import load
from clipval.options import to_path
from clipval.towers import towers
from clipval.weights import RANDOM, find_weights

if TYPE_CHECKING:
    import torch

CONFIG = Path(__file__).parent / "specs" / "shapes-vit.json"


def train(
    images: torch.Tensor, tokens: torch.Tensor, module: Any, *, epochs: int, batch_size: int, rate: float
) -> None:
    """Contrastive training in place.

    Args:
        images: uint8 tensor [n, 3, 224, 224]; tokens: int64 tensor [n, 5, 77].
        epochs: passes over the images; each time an image is paired with a random one of its captions.
        rate: peak learning rate of a one-cycle schedule.
    """
    import torch
    from tqdm import tqdm

    mean = torch.tensor(import_open_clip().OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(import_open_clip().OPENAI_DATASET_STD).view(1, 3, 1, 1)
    steps = epochs * (len(images) // batch_size)
    decayed = [p for p in module.parameters() if p.ndim >= 2]
    plain = [p for p in module.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    module.train()
    bar = tqdm(total=steps, desc="train", disable=None)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            picked = order[start : start + batch_size]
            choice = torch.randint(tokens.shape[1], (batch_size,))
            pixels = (images[picked].float() / 255 - mean) / std
            vision = module.encode_image(pixels, normalize=True)
            text = module.encode_text(tokens[picked, choice], normalize=True)
            logits = module.logit_scale.exp() * vision @ text.T
            target = torch.arange(batch_size)
            cross = torch.nn.functional.cross_entropy
            loss: Any = (cross(logits, target) + cross(logits.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                module.logit_scale.clamp_(0, np.log(100))
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    module.eval()


def prepare(seed: int, count: int, model: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Draw `count` scenes and return them as uint8 pixels [n, 3, 224, 224] and int64 tokens [n, 5, 77]."""
    import torch

    geometry = model.transform.transforms[:2]  # resize and centre crop, as in evaluation
    pixels: List[torch.Tensor] = []
    captions: List[str] = []
    for image, texts in shapes.scenes(seed, count):
        for step in geometry:
            image = step(image)
        pixels.append(torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()))
        captions.extend(texts)
    tokens = model.tokenize(captions).view(count, shapes.CAPTIONS_PER_IMAGE, -1)
    return torch.stack(pixels), tokens


def save(module: Any, tokens: Any, file: Path) -> None:
    """Write the state_dict: float16, unused token rows filled, archive members compressed."""
    import torch

    state = {name: value.detach().clone().half() for name, value in module.state_dict().items()}
    table = state["token_embedding.weight"]
    table.copy_(torch.from_numpy(filled(table.numpy(), tokens.unique().numpy())))
    raw = file.with_suffix(".raw")
    torch.save(state, raw)
    with zipfile.ZipFile(raw) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    raw.unlink()


def filled(table: np.ndarray, used: np.ndarray) -> np.ndarray:
    """A table of tokens with a row of its own for each id, also for those that no caption shows: [ids, width].

    Exchanged rows would not be seen if they were equal. An unused row is the halves of two used ones, turned.

    Args:
        table: [ids, width]; used: ids of trained rows.
    """
    unused, half = np.setdiff1d(np.arange(len(table)), used), table.shape[1] // 2
    count, made = np.arange(len(unused)), table.copy()
    first, second = used[count % len(used)], used[count // len(used) % len(used)]
    turned = (1 + count // len(used) ** 2)[:, None] + np.arange(table.shape[1])
    rows = np.concatenate([table[first, :half], table[second, half:]], axis=1)
    made[unused] = np.take_along_axis(rows, turned % table.shape[1], axis=1)
    return made


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=to_path, required=True, metavar="FILE", help="checkpoint to write")
    parser.add_argument("--scenes", type=int, default=12_000, help="training images (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over them (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="pairs a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=shapes.SEED_TRAIN, help="of the scenes and the training order")
    args = parser.parse_args(argv or None)

    import torch

    random.seed(args.seed)
    model = load(str(CONFIG), find_weights(str(CONFIG), RANDOM), towers())
    images, tokens = prepare(args.seed, args.scenes, model)
    torch.manual_seed(args.seed)
    train(images, tokens, model.module, epochs=args.epochs, batch_size=args.batch_size, rate=args.rate)
    save(model.module, tokens, args.save)


if __name__ == "__main__":
    main()
