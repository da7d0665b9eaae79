"""The data of a recipe: every data set as a domain of training rows and held-out rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from hf_moe.data.encoding import Encoder, Encoding, Example, cut
from hf_moe.data.packing import Mixture, Rows, draw, pack_examples, pad_examples
from hf_moe.data.sources import Source, hold_out, read_source
from hf_moe.finetuning.arguments import DataArguments, RecipeError


@dataclass(frozen=True)
class DomainTexts:
    """One data set, as it is measured.

    Attributes:
        share: Of the training rows, from 0 to 1; those of all domains sum to 1.
        train, held_out: Encoded examples.
        held_out_rows: The held-out examples as rows.
    """

    share: float
    train: Encoding
    held_out: Encoding
    held_out_rows: Rows

    def probe(self, row_length: int, most: int = 8) -> torch.Tensor:
        """Up to `most` rows of held-out tokens without padding, int64 `[rows, row_length]`; if few, a shorter one."""
        ids = [token for example in self.held_out.examples for token in example.input_ids]
        row_length = min(row_length, len(ids))
        count = min(most, len(ids) // row_length)
        return torch.tensor(ids[: count * row_length]).view(count, row_length)


@dataclass(frozen=True)
class DomainData(DomainTexts):
    """One data set, with the rows that it is learned from."""

    train_rows: Rows


class Measurable(Protocol):
    """Data that `measure` takes: every domain by name, and the tokens of an example at most."""

    @property
    def domains(self) -> Mapping[str, DomainTexts]: ...

    @property
    def longest(self) -> int: ...


@dataclass(frozen=True)
class Data:
    """Every domain by name, the first data set first.

    Attributes:
        longest: Tokens of an example at most.
        row_length: Tokens of a row.
        packed: Whether a row holds several examples.
    """

    domains: dict[str, DomainData]
    longest: int
    row_length: int
    packed: bool

    @property
    def num_rows(self) -> int:
        """Training rows of all domains."""
        return sum(len(domain.train_rows) for domain in self.domains.values())

    def mixture(self, count: int, seed: int) -> Mixture:
        """`count` training rows with each domain's share, spread evenly."""
        rows = {name: domain.train_rows for name, domain in self.domains.items()}
        shares = {name: domain.share for name, domain in self.domains.items()}
        order = draw({name: len(part) for name, part in rows.items()}, shares, count=count, seed=seed)
        return Mixture(rows, order)


def read_data(
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    context: int | None = None,
    chat_options: Mapping[str, Any] | None = None,
) -> Data:
    """Read, tokenise, split and pack every data set.

    Args:
        context: Tokens that the model can read at once; longer rows hold several examples, none of them longer.
        chat_options: Variables of the chat template.

    Raises:
        DataError: For a data set that cannot be used.
        RecipeError: If two data sets have one domain.
    """
    sources = [Source.parse(value) for value in arguments.data]
    names = [source.domain for source in sources]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise RecipeError(f"two data sets have the domain {repeated.pop()!r}. Give each a domain of its own.")
    longest = min(arguments.row_length, context or arguments.row_length)
    encoder = Encoder(tokenizer, max_length=longest, assistant_only=arguments.assistant_only, options=chat_options)
    total = sum(source.weight for source in sources)
    if not total:
        raise RecipeError("every data set has the weight 0: there is nothing to train on. Give one a weight.")
    domains = {
        source.domain: _read_domain(source, source.weight / total, encoder, arguments, longest) for source in sources
    }
    return Data(domains, longest, arguments.row_length, arguments.packing)


def _read_domain(source: Source, share: float, encoder: Encoder, arguments: DataArguments, longest: int) -> DomainData:
    data_set = read_source(source, on_bad_row=arguments.on_bad_row)
    encoded = list(data_set.apply(encoder.encode).values())
    kept, out = hold_out(encoded, share=arguments.held_out, most=arguments.held_out_records, where=source.path)
    train = cut(kept, longest, source.path, data_set.remarks())
    held_out = cut(out, longest, source.path)
    train_rows, held_out_rows = (_rows(part.examples, encoder.tokenizer, arguments) for part in (train, held_out))
    return DomainData(share, train, held_out, held_out_rows, train_rows)


def _rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> Rows:
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    make = pack_examples if arguments.packing else pad_examples
    return make(examples, row_length=arguments.row_length, padding=padding)
