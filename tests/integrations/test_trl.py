"""TRL: its trainers are Transformers', and take an optimizer the same ways."""

import pytest

import steepest

from .tiny import VOCABULARY, assert_same, llama, sentences, state


@pytest.fixture
def tokenizer():
    pytest.importorskip("trl")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w1", unk_token="w0")


def test_supervised_fine_tuning_resumes_bit_for_bit(tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": each["input_ids"].tolist()} for each in sentences()])

    def train(name, resume=None):
        options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "max_length": 8}
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
        trainer = SFTTrainer(
            model=llama(),
            args=SFTConfig(output_dir=str(tmp_path / name), **options, **quiet),
            train_dataset=data,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=(steepest.Recipe, {"rule": "muon", "lr": 1e-2}),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train("whole")
    again = train("again", str(tmp_path / "whole" / "checkpoint-2"))
    assert type(whole.optimizer.optimizer).__name__ == "Muon+AdamW"
    assert_same(state(again.model), state(whole.model))
    assert_same(state(again.optimizer.optimizer), state(whole.optimizer.optimizer))
