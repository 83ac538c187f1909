"""Adapt the UNet of a diffusion model, with adapters on its convolutions and attention, and draw with the result.

    python examples/libraries/04_diffusion_unet.py

A small UNet of diffusers learns to take the noise out of scikit-learn's digits; then it is to draw digits as negatives,
which it has never seen. Adapters on all of its weights, ``sites="auto"``, learn that while the UNet stays as it is, and
a pipeline draws with the folded UNet, which is diffusers' own class again.
Needs ``pip install 'adapter-compiler[integrations,demo]'``.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
import torch.nn.functional as F

import adapter_compiler as ac

STEPS, TIMES = 80, 100


def make_unet() -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def find_loss(model: Any, scheduler: Any, images: torch.Tensor) -> torch.Tensor:
    """The error of the noise that the model sees in noisy images."""
    noise, times = torch.randn_like(images), torch.randint(TIMES, (len(images),))
    return F.mse_loss(model(scheduler.add_noise(images, noise, times), times).sample, noise)


def train(model: Any, optimizer: torch.optim.Optimizer, scheduler: Any, images: torch.Tensor) -> None:
    for _ in range(STEPS):
        find_loss(model, scheduler, images[torch.randint(len(images), (16,))]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def measure(model: Any, scheduler: Any, images: torch.Tensor) -> float:
    """The loss with the same noise for every model."""
    torch.manual_seed(1)
    return float(find_loss(model, scheduler, images))


def draw(unet: Any, scheduler: Any) -> torch.Tensor:
    """Four images from noise, by diffusers' pipeline, with values from 0 to 1."""
    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    options = {"batch_size": 4, "num_inference_steps": 10, "generator": torch.Generator().manual_seed(0)}
    return torch.as_tensor(pipeline(**options, output_type="np").images)


def main() -> None:
    from diffusers import DDIMScheduler
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    learned, held_out, negatives = images[:1500], -images[1500:], -images[:1500]
    scheduler = DDIMScheduler(num_train_timesteps=TIMES)
    unet = make_unet()
    train(unet, torch.optim.AdamW(unet.parameters(), lr=3e-3), scheduler, learned)

    example = {"sample": images[:2], "timestep": torch.tensor([3, 5])}
    adapted: Any = ac.compile_with_adapters(
        unet, example_kwargs=example, config=ac.AdapterConfig(rank=6, alpha=6, sites="auto")
    )
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=4, total_steps=STEPS))
    train(adapted, optimizer, scheduler, negatives)

    merged = adapted.fold()
    losses = [measure(model, scheduler, held_out) for model in (unet, adapted, merged)]
    before, after, folded = losses
    drawn = {name: float(draw(model, scheduler).mean()) for name, model in (("base", unet), ("folded", merged))}
    print(f"error on negatives: {before:.3f} before, {after:.3f} adapted, {folded:.3f} folded")
    print(f"mean of drawn pixels: {drawn['base']:.2f} by the base, {drawn['folded']:.2f} by the folded UNet")
    print(f"ranks: {budget.live_triplets} triplets at {len(adapted.sites)} weights")
    assert after < 0.8 * before and abs(after - folded) < 1e-4, losses
    assert drawn["folded"] > drawn["base"] + 0.05, "negatives are bright"
    assert type(merged) is type(unet)


if __name__ == "__main__":
    if missing := [name for name in ("diffusers", "sklearn") if importlib.util.find_spec(name) is None]:
        print(f"skipped: {missing[0]} is not installed; pip install 'adapter-compiler[integrations,demo]'")
        sys.exit()
    main()
