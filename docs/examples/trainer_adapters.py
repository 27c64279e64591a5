"""Fine-tune adapters with transformers and peft: ``python docs/examples/trainer_adapters.py``."""

import tempfile

import peft
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from opacus_bpclip.integrations.transformers import PrivacyArguments, PrivateTrainer

torch.manual_seed(0)
# Stands for a pretrained model: BertForSequenceClassification.from_pretrained("bert-base-uncased").
config = BertConfig(
    vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=16, initializer_range=0.2,
)  # fmt: skip
model = BertForSequenceClassification(config)
model = peft.get_peft_model(
    model, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
)

# Stands for your texts: of those with label 1 most words are from the vocabulary's second half.
labels = torch.randint(2, (2400,))
halves = torch.bernoulli(0.1 + 0.8 * labels.unsqueeze(1).repeat(1, 12)).long()
words = torch.randint(100, halves.shape) + 100 * halves
texts = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label}
    for ids, label in zip(words, labels, strict=True)
]
train_dataset, eval_dataset = texts[:2000], texts[2000:]


def accuracy(predicted):
    return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}


args = TrainingArguments(
    tempfile.mkdtemp(),
    per_device_train_batch_size=50,
    gradient_accumulation_steps=4,
    learning_rate=0.05,
    num_train_epochs=4,
    report_to=[],
    disable_tqdm=True,
)
trainer = PrivateTrainer(
    model=model,
    args=args,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
    compute_metrics=accuracy,
    privacy=PrivacyArguments(target_epsilon=3.0, target_delta=1e-4),
)
trainer.train()
found = trainer.evaluate()["eval_accuracy"]
print(f"accuracy {found:.2f}, epsilon {trainer.epsilon:.2f} at delta 1e-4")
