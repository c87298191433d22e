"""Hugging Face's Trainer: accumulation, clipping, evaluation, checkpoints.

    python examples/huggingface_trainer.py

A small language model on made-up sentences; a few seconds on a CPU.
"""

import bpfx  # first: it stands in for operators that some builds of torchvision lack

# isort: split

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from bpfx.integrations.huggingface import Trainer

set_seed(0)
WORDS, LENGTH = 64, 32


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    """Each next word is three times the last plus a number of the sentence's own: to be read off its first words."""
    words = torch.randint(0, WORDS, (count, 1))
    added = torch.randint(1, 5, (count, 1))
    for _ in range(LENGTH - 1):
        words = torch.cat([words, (3 * words[:, -1:] + added) % WORDS], 1)
    return [{"input_ids": row, "labels": row} for row in words]


config = LlamaConfig(
    vocab_size=WORDS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
    use_cache=False,  # before the conversion: keys and values would be outputs of every block
)
model = LlamaForCausalLM(config)
train, test = sentences(1024), sentences(128)

example = torch.utils.data.default_collate(train[:16])
step = bpfx.convert(model, None, example, blocks=["model.layers.1", "model.layers.2"])

arguments = TrainingArguments(
    output_dir="runs/huggingface_trainer",
    use_cpu=True,
    per_device_train_batch_size=16,
    gradient_accumulation_steps=2,
    max_steps=40,
    learning_rate=5e-3,
    max_grad_norm=1.0,
    logging_steps=10,
    eval_strategy="steps",
    eval_steps=20,
    save_steps=20,
    save_total_limit=2,
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(step, arguments, train_dataset=train, eval_dataset=test)
trainer.train()  # train(resume_from_checkpoint=True) continues from the last checkpoint
print(f"refreshes: {len(step.diagnostics.refreshes)}")

trainer.save_model("runs/huggingface_trainer/final")  # the plain model
again = LlamaForCausalLM.from_pretrained("runs/huggingface_trainer/final")
print(f"saved and loaded: {type(again).__name__}, {sum(p.numel() for p in again.parameters()):,} parameters")
