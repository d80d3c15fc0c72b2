"""A student with half the layers of all-MiniLM-L6-v2, taught as DistilBERT was: models and data for recipe.yaml.

Teacher and student are the sentence encoder with a head for language modelling: the product with its own word
embeddings, which costs no weights. The teacher was never trained with that head, but what its states resemble most is
the word itself and its synonyms ("target": targets, targeted, aim, goal), and that is what the soft loss teaches.
All choices were made by the validation sentences.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import MaskedLMOutput

from pycompress.demo import english
from pycompress.demo.encoder import Batch

SENTENCES, LENGTH = 32, 48  # a batch; tokens, which few sentences exceed
LAYERS = (0, 3, 5)  # of the teacher's six; without any training nearer to it than 0, 2, 4 or 1, 3, 5
SHARPNESS = 8.0  # what makes the products logits: at temperature 2 a quarter of the mass is on the likeliest word
NO_WORD = -100
MASKED, RANDOM = 0.8, 0.1  # of the words to predict: what stands in their place, as for BERT; the others stay


class LanguageModel(nn.Module):
    """An encoder and its word embeddings as head.

    words: (batch, tokens), the word to predict or NO_WORD. Only with them there are logits (batch, tokens, vocabulary),
    and a loss; without, it is the sentence encoder.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, words: Tensor | None = None, output_hidden_states: bool = False
    ) -> MaskedLMOutput:
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=output_hidden_states
        )
        if words is None:
            return states
        table = self.encoder.embeddings.word_embeddings.weight
        logits = functional.linear(SHARPNESS * states.last_hidden_state, table)
        asked = words != NO_WORD
        loss = functional.cross_entropy(logits[asked].float(), words[asked])
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=states.hidden_states)


def teacher() -> nn.Module:
    return LanguageModel(english.encoder().model).eval()


def student() -> nn.Module:
    encoder = copy.deepcopy(english.encoder().model)
    encoder.encoder.layer = nn.ModuleList(encoder.encoder.layer[i] for i in LAYERS)
    encoder.config.num_hidden_layers = len(LAYERS)
    return LanguageModel(encoder).eval()


def masked(batch: Batch, hidden: float = MASKED) -> Batch:
    """The batch with 15 % of its words to be predicted, drawn from torch's generator; `hidden` of them are masked."""
    ids = batch["input_ids"]
    tokenizer = english.encoder().tokenizer
    special = torch.tensor(tokenizer.all_special_ids)
    asked = (torch.rand(ids.shape) < 0.15) & ~torch.isin(ids, special)
    asked[0, 1] = True  # a loss needs one
    fate = torch.rand(ids.shape)
    seen = torch.where(asked & (fate < hidden), tokenizer.mask_token_id, ids)
    others = torch.randint(len(tokenizer), ids.shape)
    seen = torch.where(asked & (fate >= hidden) & (fate < hidden + RANDOM), others, seen)
    return {
        "input_ids": seen,
        "attention_mask": batch["attention_mask"],
        "words": torch.where(asked, ids, NO_WORD),
    }


def train_batches(epoch: int, quick: bool = False) -> Iterator[Batch]:
    """The training sentences once; all is drawn from torch's generator, which is seeded by the epoch."""
    for batch in english.batches(english.encoder(), english.parts(quick).train, SENTENCES, LENGTH):
        yield masked(batch)


def sentences(quick: bool = False) -> list[Batch]:
    """A batch of validation sentences as they are: what the student is timed with."""
    batch = english.encoder().tokenize(english.parts(quick).validation[:SENTENCES], LENGTH)
    return [{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}]


def quality(model: nn.Module, quick: bool = False) -> dict[str, float]:
    """Of the sentence embeddings to the teacher's; and how many masked words of the first 640 sentences are found."""
    found = english.similarity(model.encoder, quick)
    for part in ("test", "validation"):
        found[f"{part} masked words %"] = 100 * words_found(model, getattr(english.parts(quick), part)[:640])
    return found


@torch.no_grad()
def words_found(model: nn.Module, texts: list[str]) -> float:
    right = asked = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same words each time
        for batch in english.batches(english.encoder(), texts, SENTENCES, LENGTH):
            batch = masked(batch, hidden=1.0)
            there = batch["words"] != NO_WORD
            likeliest = model(**batch).logits[there].argmax(1)
            right += int((likeliest == batch["words"][there]).sum())
            asked += int(there.sum())
    return right / max(asked, 1)
