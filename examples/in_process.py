"""Adaptation in a program of your own, without broker and store: two cameras that share each pass.

    python examples/in_process.py

`state` holds everything about the cameras: a dict of tensors with a row for each. Store it wherever you like.
"""

from pathlib import Path

import torch

from meta.bundle import load_bundle
from meta.data import fashion_mnist
from meta.mgg import MOST_FRAMES
from meta.shifts import HELD_OUT
from meta.source import as_frames

# Frames in a micro-batch of each camera. If you have more at a time, split them: see MOST_FRAMES.
CAMERAS, FRAMES, STEPS = 2, MOST_FRAMES, 40


def main() -> None:
    """Print the accuracy of both models on hazy pictures."""
    torch.set_num_threads(1)
    bundle = load_bundle(Path("bundles/fashion-mnist"))
    method, preprocess = bundle.method, bundle.manifest.preprocess
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    data, random = fashion_mnist("test"), torch.Generator().manual_seed(0)

    state = method.fresh(CAMERAS)
    camera = torch.arange(CAMERAS).repeat_interleave(FRAMES)  # whose frame each is
    fixed = adapted = 0.0
    for _ in range(STEPS):
        chosen = torch.randint(len(data.labels), (CAMERAS * FRAMES,), generator=random).numpy()
        images, labels = torch.from_numpy(data.images[chosen]).unsqueeze(1) / 255, torch.from_numpy(data.labels[chosen])
        hazy = HELD_OUT["haze"](images, torch.full((len(images),), 0.15), torch.rand(4, generator=random), random)
        frames = as_frames(hazy, mean, std)

        forward = method.predict(frames, camera, state)  # answers first,
        adapted += float((forward.answer.argmax(1) == labels).float().mean()) / STEPS
        state = method.update(forward).state  # then learns from the same frames, without labels

        with torch.inference_mode():
            fixed += float((bundle.model(frames).argmax(1) == labels).float().mean()) / STEPS
    print(f"source model {fixed:.1%}, adapted {adapted:.1%}")


if __name__ == "__main__":
    main()
