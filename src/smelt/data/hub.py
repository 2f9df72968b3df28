"""A dataset of the Hugging Face hub, or a folder `datasets` can read, as a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import datasets
from annotated_types import Interval
from datasets.naming import camelcase_to_snakecase

from smelt.data import Document, Split
from smelt.data._text import clean, split_of
from smelt.spec import Paper, SmeltError, nearest

__all__ = ["Hub"]

OWN = {"train": (), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Hub:
    """split(d) = the dataset's own split; of `train`, where it has none: test if h < test, validation if h < test + validation.

    h = hash(d without whitespace) in [0, 1). `name` is owner/name on the hub, a folder written by
    `Dataset.save_to_disk`, or a folder of json, parquet or text files. Local before network: a folder is read where
    it lies, a dataset prepared before is read from the cache (memory-mapped), anything else is streamed. Datasets with
    a loading script are refused by `datasets`: no code is run.

    Cost: one pass over the split (over `train` where a share is cut from it); memory: the batches of one shard.
    Raises SmeltError when there is no such dataset, configuration, split or field, naming the nearest.
    """

    paper: ClassVar = Paper("Datasets: A Community Library for Natural Language Processing", "arXiv:2109.02846", "section 3.3, streaming")
    name: str
    field: str = "text"
    config: str = ""  # the configuration, where the dataset has several
    revision: str = ""  # a branch, tag or commit
    train: str = "train"  # the dataset's split to train on
    validation: Annotated[float, Interval(ge=0, lt=1)] = 0.04  # share of train, where the dataset has no such split
    test: Annotated[float, Interval(ge=0, lt=1)] = 0.04

    def __post_init__(self) -> None:
        if self.validation + self.test >= 1:
            raise SmeltError(f"hub: validation={self.validation} and test={self.test} leave nothing to train on")

    def documents(self, split: Split) -> Iterator[Document]:
        own = self._opened()
        if self.train not in own:
            raise SmeltError(f"hub: '{self.name}' has no split '{self.train}' to train on{nearest(self.train, own)}; say train='...'")
        chosen = {s: next((n for n in OWN[s] if n in own and n != self.train), "") for s in ("validation", "test")} | {"train": ""}
        source = chosen[split] or self.train
        shares = [0.0 if chosen[s] else share for s, share in (("validation", self.validation), ("test", self.test))]
        for number, row in enumerate(self._rows(own[source])):
            if self.field not in row:
                raise SmeltError(f"hub: '{self.name}' has no field '{self.field}'{nearest(self.field, row)}; say field='...'")
            text = row[self.field]
            if text is not None and not isinstance(text, str):
                raise SmeltError(f"hub: the field '{self.field}' of '{self.name}' holds {type(text).__name__}, not text")
            if text and text.strip() and (chosen[split] or split_of(text, *shares) == split):
                yield Document(f"{self.name}/{source}:{number}", clean(text))

    def digest(self) -> str:
        about = [repr(self)]
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                about.append(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}")
        else:
            builder = self._asked(datasets.load_dataset_builder, self.name, self.config or None, revision=self.revision or None)
            about += [str(builder.hash), str(builder.config_id)]
        return "hub-" + hashlib.sha256("\n".join(about).encode()).hexdigest()

    def _rows(self, table: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        rows = iter(table)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreadable(error) from error
            yield row

    def _opened(self) -> Mapping[str, Any]:
        folder = Path(self.name).expanduser()
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = self._asked(datasets.load_from_disk, str(folder))
            return loaded if isinstance(loaded, dict) else {self.train: loaded}
        if folder.is_dir():
            return self._asked(datasets.load_dataset, str(folder), self.config or None, streaming=True)
        *owner, name = self.name.split("/")
        prepared = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(name)])
        streaming = not (datasets.config.HF_HUB_OFFLINE or prepared.is_dir())
        return self._asked(datasets.load_dataset, self.name, self.config or None, revision=self.revision or None, streaming=streaming)

    def _asked(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """A call of `datasets` without its bars and warnings, whatever it raises as one line."""
        bars, level = datasets.utils.logging.is_progress_bar_enabled(), datasets.utils.logging.get_verbosity()
        datasets.utils.logging.set_verbosity_error()
        datasets.utils.logging.disable_progress_bar()
        try:
            return function(*arguments, **options)
        except Exception as error:
            raise self._unreadable(error) from error
        finally:
            datasets.utils.logging.set_verbosity(level)
            if bars:
                datasets.utils.logging.enable_progress_bar()

    def _unreadable(self, error: Exception) -> SmeltError:
        offline = " (the network is switched off by HF_HUB_OFFLINE)" if datasets.config.HF_HUB_OFFLINE else ""
        said = str(error).strip().split("\n")[0][:300]
        return SmeltError(f"hub: '{self.name}' cannot be read{offline}: {type(error).__name__}: {said}")
