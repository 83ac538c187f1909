"""TRL and sentence-transformers around an adapted model: a causal model that generates while it is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

import adapter_compiler as ac

transformers = pytest.importorskip("transformers", reason="the extra 'integrations' is not installed")
pytest.importorskip("accelerate", reason="the extra 'integrations' is not installed")
datasets = pytest.importorskip("datasets", reason="the extra 'integrations' is not installed")

from adapter_compiler.integrations.trainer import TrainerBudget  # noqa: E402 - after the skip

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ["<pad>", "<eos>", "<unk>", "one", "two", "three", "four", "five", "six", "seven"]


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_causal() -> ac.AdaptedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(3, len(WORDS), (2, 6))
    return ac.compile_with_adapters(model, example_kwargs={"input_ids": tokens}, config=ac.AdapterConfig(rank=4))


def test_trl_sft_with_generation_in_evaluation(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="the extra 'integrations' is not installed")
    adapted, tokenizer = make_causal(), make_tokenizer()
    generated: list[str] = []

    class Generate(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tokens = tokenizer("one two", return_tensors="pt")["input_ids"]
            made = kwargs["model"].generate(tokens, max_new_tokens=4, do_sample=False)
            generated.append(tokenizer.decode(made[0]))

    rows = datasets.Dataset.from_dict({"text": ["one two three four five six"] * 24})
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=24,
        per_device_train_batch_size=4,
        learning_rate=5e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        eval_strategy="steps",
        eval_steps=8,
        save_steps=12,
        logging_steps=4,
        disable_tqdm=True,
        max_length=16,
    )
    budget = TrainerBudget(target_rank=2, interval=2, compact=True)
    trainer = trl.SFTTrainer(
        model=adapted,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=tokenizer,
        callbacks=[budget, Generate()],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert budget.budget is not None
    assert budget.budget.live_triplets == 2 * len(adapted.plan)
    assert sum(adapter.rank for adapter in adapted.plan) == 2 * len(adapted.plan)
    assert len(generated) == 5
    tokens = tokenizer("one two", return_tensors="pt")["input_ids"]
    options, merged = {"max_new_tokens": 4, "do_sample": False}, cast(Any, adapted.fold())
    assert torch.equal(adapted.generate(tokens, **options), merged.generate(tokens, **options))


def test_a_pipeline_takes_it() -> None:
    adapted, tokenizer = make_causal(), make_tokenizer()
    found = transformers.pipeline("text-generation", model=adapted.eval(), tokenizer=tokenizer, device="cpu")(
        "one two", max_new_tokens=3, do_sample=False
    )
    assert found[0]["generated_text"].startswith("one two")


def test_seq2seq_trainer_generates_in_evaluation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model, tokenizer = transformers.T5ForConditionalGeneration(config), make_tokenizer()
    sentences = [torch.randint(3, len(WORDS), (6,)).tolist() for _ in range(32)]
    rows = [{"input_ids": one, "labels": one} for one in sentences]
    example = {name: torch.tensor(sentences[:2]) for name in ("input_ids", "labels")}
    adapted: Any = ac.compile_with_adapters(model, example_kwargs=example, config=ac.AdapterConfig(rank=4))
    made: list[Any] = []

    def keep(found: Any) -> dict[str, float]:
        made.append(found.predictions)
        return {}

    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        learning_rate=2e-2,
        save_strategy="no",
        disable_tqdm=True,
        predict_with_generate=True,
        generation_max_length=5,
    )
    budget = TrainerBudget(target_rank=2, interval=2)
    trainer = transformers.Seq2SeqTrainer(
        model=adapted,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:8],
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        callbacks=[budget],
        compute_metrics=keep,
    )
    trainer.train()
    assert budget.budget is not None
    assert budget.budget.live_triplets == 2 * len(adapted.plan)
    trainer.evaluate(max_length=5)
    merged: Any = adapted.fold().eval()
    expected = merged.generate(torch.tensor(sentences[:8]), attention_mask=torch.ones(8, 6), max_length=5)
    assert made[0][:, : expected.shape[1]].tolist() == expected.tolist()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(**example).logits, merged(**example).logits, rtol=0, atol=0)


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_pipelines_of_encoders_take_it(task: str) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    kind = transformers.BertForSequenceClassification if task == "text-classification" else transformers.BertModel
    example = {"input_ids": torch.randint(3, len(WORDS), (2, 5))}
    adapted = ac.compile_with_adapters(kind(config).eval(), example_kwargs=example, config=ac.AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
    both = [
        transformers.pipeline(task, model=model, tokenizer=make_tokenizer(), device="cpu")("one two three")
        for model in (adapted, adapted.fold())
    ]
    found, expected = ([one["score"] for one in made] if task == "text-classification" else made[0] for made in both)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def make_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.BertModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_sentence_transformers_with_the_encoder_inside(tmp_path: Path) -> None:
    sentence = pytest.importorskip("sentence_transformers", reason="the extra 'integrations' is not installed")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

    folder = make_encoder(tmp_path / "encoder")
    model = sentence.SentenceTransformer(str(folder), device="cpu")
    encoder = model[0].model
    tokens = {"input_ids": torch.randint(3, len(WORDS), (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    adapted = ac.compile_with_adapters(encoder, example_kwargs=tokens, config=ac.AdapterConfig(rank=4))
    before = model.encode(["one two three"])
    model[0].model = adapted
    assert (model.encode(["one two three"]) == before).all()
    pairs = {"anchor": ["one two", "five six"] * 8, "positive": ["one three", "five seven"] * 8}
    rows = datasets.Dataset.from_dict(pairs)
    arguments = sentence.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    budget = TrainerBudget(target_rank=2, interval=2, warmup_steps=1, final_steps=4)
    trainer = sentence.SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[budget],
    )
    trainer.train()
    assert budget.budget is not None
    assert budget.budget.live_triplets == 2 * len(adapted.plan)
    expected = model.encode(["one two three"])
    assert abs(expected - before).max() > 1e-3
    model[0].model = adapted.fold()
    torch.testing.assert_close(torch.tensor(model.encode(["one two three"])), torch.tensor(expected))
    model.save(str(tmp_path / "merged"))
    again = sentence.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    torch.testing.assert_close(torch.tensor(again.encode(["one two three"])), torch.tensor(expected))
