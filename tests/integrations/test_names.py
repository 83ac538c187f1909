"""What libraries and users ask of a model that is like the user's own, and PEFT's names."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import AdapterCompilerError, ConfigError
from tests.integrations.models import Net, draw_values, make_adapted

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def test_forward_has_the_signature_of_the_module() -> None:
    adapted = make_adapted()
    assert inspect.signature(adapted.forward) == inspect.signature(Net().forward)
    assert list(inspect.signature(type(adapted).forward).parameters) == ["self", "x", "labels"]
    assert isinstance(adapted, ac.AdaptedModel)
    assert type(adapted) is type(make_adapted())
    assert type(adapted).__name__ == "AdaptedNet"


def test_a_forward_of_the_instance_counts() -> None:
    net = Net()
    plain = net.forward
    net.forward = lambda x, extra=1: plain(x)  # type: ignore[method-assign, assignment]
    adapted = ac.compile_with_adapters(net, config=ac.AdapterConfig(rank=2))
    assert list(inspect.signature(adapted.forward).parameters) == ["x", "extra"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_it_too(how: str) -> None:
    adapted = make_adapted()
    draw_values(adapted)
    copied = copy.deepcopy(adapted) if how == "deepcopy" else pickle.loads(pickle.dumps(adapted))
    assert type(copied) is type(adapted)
    torch.testing.assert_close(copied(X)["logits"], adapted(X)["logits"], rtol=0, atol=0)


def test_compile_and_export_take_it() -> None:
    adapted = make_adapted()
    draw_values(adapted)
    expected = adapted(X)["logits"]
    compiled = torch.compile(adapted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X)["logits"], expected)
    exported = torch.export.export(adapted, (), {"x": X}).module()
    torch.testing.assert_close(exported(x=X)["logits"], expected)


def test_numbers_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    adapted = make_adapted()
    trained, total = adapted.get_nb_trainable_parameters()
    assert trained == 4 * (6 + 16 + 1) + 4 * (16 + 4 + 1)
    assert total == trained + sum(p.numel() for p in Net().parameters())
    adapted.print_trainable_parameters()
    assert capsys.readouterr().out == f"trainable params: {trained} || all params: {total} || trainable%: 49.4382\n"


def test_numbers_and_methods_mean_what_they_mean_in_peft(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"]}
    theirs: Any = peft.get_peft_model(Net(), peft.LoraConfig(**options))
    ours: Any = make_adapted(3, kind="lora", alpha=6.0)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for model in (theirs, ours):
        model.print_trainable_parameters()
    expected, found = capsys.readouterr().out.splitlines()
    assert found == expected
    draw_values(ours)
    ours.save_pretrained(tmp_path)
    theirs.load_adapter(tmp_path, "other")
    for model, name in ((theirs, "second"), (ours, "second")):
        model.add_adapter(name, *([peft.LoraConfig(**options)] if model is theirs else []))
        model.set_adapter(name)
        assert model.active_adapters == [name]
    assert [p.requires_grad for n, p in theirs.named_parameters() if "lora_A.second" in n] == [True, True]
    assert len(ours.trainable_parameters()) == 4
    ours.set_adapter("default")
    theirs.set_adapter("other")
    for model in (ours, theirs):
        model.delete_adapter("second")
    torch.testing.assert_close(ours(X)["logits"], theirs(X)["logits"])
    torch.testing.assert_close(ours.get_base_model()(X)["logits"], theirs.get_base_model()(X)["logits"])
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(X)["logits"], theirs(X)["logits"])
    merged = [model.merge_and_unload(safe_merge=True) for model in (ours, theirs)]
    assert merged[0].state_dict().keys() == merged[1].state_dict().keys()
    for name, value in merged[1].state_dict().items():
        torch.testing.assert_close(merged[0].state_dict()[name], value)


def test_the_hub_does_not_get_the_weights_without_adapters() -> None:
    with pytest.raises(ConfigError, match=r"push_to_hub\('me/it'\) would upload the frozen weights.*upload_folder"):
        make_adapted().push_to_hub("me/it")


def test_adapters_by_the_names_of_peft() -> None:
    adapted = make_adapted()
    adapted.add_adapter("task")
    adapted.set_adapter("task")
    assert adapted.active_adapters == ["task"]
    adapted.set_adapter(["default"])
    adapted.delete_adapter("task")
    assert adapted.adapter_names == ("default",)
    with pytest.raises(ConfigError, match=r"names 2 adapters, expected one.*combine"):
        adapted.set_adapter(["default", "task"])
    assert adapted.get_base_model() is adapted.module
    draw_values(adapted)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(X)["logits"], Net()(X)["logits"], rtol=0, atol=0)


def test_merge_and_unload() -> None:
    adapted = make_adapted()
    draw_values(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert type(merged) is Net
    torch.testing.assert_close(merged(X)["logits"], adapted(X)["logits"])
    with torch.no_grad():
        adapted.adapters.get_parameter("second.weight.lam")[0] = float("nan")
    assert type(adapted.merge_and_unload()) is Net
    with pytest.raises(AdapterCompilerError, match=r"second\.weight has inf or nan after merging"):
        adapted.merge_and_unload(safe_merge=True)


def test_save_pretrained_writes_what_peft_reads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = make_adapted()
    draw_values(adapted)
    adapted.save_pretrained(tmp_path, safe_serialization=True)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(loaded(X)["logits"], adapted(X)["logits"])
    adapted.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="save_pretrained has no option 'variant'"):
        adapted.save_pretrained(tmp_path, variant="fp16")


def test_repr_says_what_is_adapted() -> None:
    adapted = make_adapted()
    adapted.add_adapter("task")
    assert repr(adapted).splitlines()[:4] == [
        "AdaptedModel(",
        "  2 sites: svd, rank 4",
        "  adapter: 'default' (inactive: 'task')",
        "  trains 176 values, 97.78% of the module's 180",
    ]
    assert "(first): Linear(in_features=6, out_features=16, bias=True)" in repr(adapted)
    assert "first.weight" in adapted._repr_html_()


def test_a_causal_model_keeps_its_own() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 40, (2, 7))
    adapted = ac.compile_with_adapters(model, example_kwargs={"input_ids": tokens}, config=ac.AdapterConfig(rank=2))
    draw_values(adapted)
    assert adapted.config is adapted.module.config
    assert adapted.device == torch.device("cpu")
    assert adapted.dtype is torch.float32
    assert adapted.generation_config is adapted.module.generation_config
    assert adapted._get_name() == "GPT2LMHeadModel"
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    models: list[Any] = [adapted, adapted.fold()]
    found, expected = (one.generate(tokens, **options) for one in models)
    assert torch.equal(found, expected)
    adapted.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 6 is to call it something else
        adapted.gradient_checkpointing_enable()
    adapted.eval()
    expected_loss = adapted(input_ids=tokens, labels=tokens).loss
    adapted.train()
    for module in adapted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss = adapted(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.testing.assert_close(loss, expected_loss)
    assert all(p.grad is not None for p in adapted.trainable_parameters())


def test_a_unet_of_diffusers_keeps_its_own() -> None:
    diffusers = pytest.importorskip("diffusers", reason="the extra 'integrations' is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    call = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([1, 5])}
    config = ac.AdapterConfig(rank=2, sites="*.weight")
    adapted = ac.compile_with_adapters(unet, example_kwargs=call, config=config)
    assert {"conv2d", "linear"} <= {site.op for site in adapted.sites}
    draw_values(adapted)
    pipeline = diffusers.DDPMPipeline(unet=adapted, scheduler=diffusers.DDPMScheduler(num_train_timesteps=4))
    made = [
        pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
        for pipe in (pipeline, diffusers.DDPMPipeline(unet=adapted.fold(), scheduler=pipeline.scheduler))
    ]
    assert abs(made[0] - made[1]).max() < 1e-3
