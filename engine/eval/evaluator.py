"""What evaluate.py measures of one run: scores, baselines, and scored documents."""

import math
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from engine.base.distributed import Processes, autocast
from engine.base.errors import UserError
from engine.base.options import Draws, NonNegativeInt, PositiveInt
from engine.data.shards import splits_in
from engine.data.tokenizer import has_tokenizer, load_tokenizer
from engine.data.tokens import TokenFile, dataset_folder
from engine.data.windows import windows
from engine.eval.baselines import Baselines, fit_temperature
from engine.eval.ensemble import load, members_of
from engine.eval.evaluation import check_n_samples, evaluate, score_tokens
from engine.eval.metrics import Scores, out_of_domain, reducible_loss
from engine.eval.scored_text import ScoredText, score_text
from engine.eval.texts import TextStats, first_document
from engine.eval.validation import exp
from engine.runs.checkpoint import check_tokenizer, folder_of
from engine.runs.percentiles import Percentiles, percentiles_of

VAL_TOKENS = 10_000  # of the validation split, for the temperature and the usual uncertainties
KEYS = {"nll": "nll", "total": "entropy", "epistemic": "mutual_information"}
SHOWN_TOKENS = 600  # of a document that the report colours


@dataclass(frozen=True)
class EvaluationConfig:
    split: str = "test"  # test | val | train
    dataset: str = ""  # another data set than the run's own (same tokenizer)
    # data sets of out-of-domain (OOD) text, separated by commas: does each uncertainty detect it?
    ood_dataset: str = ""
    # a better model of the same tokens: does each uncertainty know where it predicts better?
    better: str = ""
    # distance between windows; below block_size each token has more context, and it takes longer;
    # 0: block_size
    stride: NonNegativeInt = 0
    batch_size: PositiveInt = 16  # windows at a time: speed and memory
    # this many windows, evenly spread over the split; 0: the whole split
    limit: NonNegativeInt = 0
    # Bayesian: posterior draws averaged per prediction; 0: the mean weights; -1: all, not sampled
    n_samples: Draws = 0
    # average n_samples passes with dropout, for runs that were trained with it
    mc_dropout: bool = False
    dtype: str = "float32"  # float32 | bfloat16 | float16 | auto

    def __post_init__(self):
        if self.mc_dropout and self.n_samples < 1:
            raise UserError("mc_dropout averages passes; add --n_samples=16, for example")


class Evaluator:
    """A run, an ensemble of runs, or GPT-2 by name, and the text to evaluate it on.

    The constructor finds mistakes before other runs are evaluated, which may take hours."""

    def __init__(self, source: str, config: EvaluationConfig, processes: Processes):
        self.source = source
        self.config = config
        self.processes = processes
        self.cast, _ = autocast(processes.device, config.dtype)
        self.members = members_of(source)
        self.model, dataset = load(source)
        self.models = getattr(self.model, "members", [self.model])
        if config.mc_dropout:
            if not all(model.config.dropout for model in self.models):
                raise UserError(f"{source} was not trained with dropout; leave --mc_dropout out")
            for model in self.models:
                model.mc_dropout = True
        draws = self.model.bayes_layers() or config.mc_dropout
        self.n_samples = config.n_samples if draws else 0
        check_n_samples(self.model, self.n_samples, source)
        self.block_size = self.model.config.block_size
        self.stride = config.stride or self.block_size
        if self.stride > self.block_size:
            raise UserError(
                f"stride = {self.stride} would skip tokens: {source} has "
                f"block_size = {self.block_size}"
            )
        self.dataset = config.dataset or dataset
        if self.dataset is None:
            raise UserError(f"{source} does not name its data set; add --dataset=NAME")
        self._open_texts()

    def _open_texts(self):
        config = self.config
        n_ids = self.model.config.vocab_size
        self.file = self._split(self.dataset)
        self.frequencies = TokenFile(self.dataset, "train").frequencies(n_ids)
        folder = folder_of(self.members[0])
        if not has_tokenizer(folder):
            folder = dataset_folder(self.dataset)
        self.tokenizer = load_tokenizer(folder)
        oods = [name.strip() for name in config.ood_dataset.split(",")]
        self.oods = {name: self._split(name) for name in oods if name}
        self.better = None
        if config.better:
            for member in members_of(config.better):
                check_tokenizer(member, dataset_folder(self.dataset))
            self.better, _ = load(config.better)
            ours, theirs = self.model.config, self.better.config
            if theirs.vocab_size != ours.vocab_size or theirs.block_size < ours.block_size:
                raise UserError(
                    f"{config.better} has another vocab_size or a smaller block_size than "
                    f"{self.source}; give another --better"
                )

    def _split(self, dataset, split=""):
        for member in self.members:
            check_tokenizer(member, dataset_folder(dataset))
        file = TokenFile(dataset, split or self.config.split)
        file.check(self.model.config.vocab_size)
        return file

    def fit(self) -> None:
        """Fit the baselines to the training and the validation text, and read from the latter what
        uncertainties are usual."""
        temperature = None
        self.usual = Percentiles()
        if "val" in splits_in(self.file.path.parent):
            val = self._split(self.dataset, "val")
            n_windows = 1 + math.ceil(max(0, VAL_TOKENS - self.block_size) / self.stride)
            read_val = partial(self._evaluate, val, limit=n_windows)
            columns = read_val().columns
            found = {name: columns[key] for name, key in KEYS.items() if key in columns}
            self.usual = percentiles_of(found)
            temperature = fit_temperature(lambda score: read_val(score=score))
        train = TokenFile(self.dataset, "train")
        self.baselines = Baselines(self.models[0], train, self.processes, self.cast, temperature)

    def scores(self) -> tuple[dict, Scores]:
        """All scores of the split, as a row and by token."""
        config = self.config
        self.fit()
        eot = self.tokenizer.eot
        n_documents = 0
        if eot is not None:
            n_documents = self.file.counts(self.model.config.vocab_size)[eot].item()
        text = TextStats(self.tokenizer, self.frequencies, n_documents, part=bool(config.limit))
        better = self.better and self.better.to(self.processes.device)
        scores = self._evaluate(self.file, text, config.limit, self.baselines, better)
        row = scores.result()
        nats = row["nll"] * row["n_tokens"]
        row |= {
            "dataset": str(self.dataset),
            "split": config.split,
            "sha256": self.file.sha256,
            "tokenizer": self.tokenizer.describe(),
            "unit": text.unit,
            "block_size": self.block_size,
            "stride": self.stride,
            "n_samples": self.n_samples,
            "mc_dropout": config.mc_dropout,
            "limit": config.limit,
            "n_words": text.n_words,
            "n_bytes": text.n_bytes,
            "word_perplexity": exp(nats / max(1, text.n_words)),
            "bits_per_byte": nats / max(1, text.n_bytes) / math.log(2),
        }
        if self.model.bayes_layers() and len(self.members) == 1:
            row["kl"] = self.model.kl().item()
            row["kl_weight"] = self.model.config.head.kl_weight
        if self.baselines.temperature:
            row["temperature"] = self.baselines.temperature
        if self.better:
            row["better"] = {"run": config.better} | reducible_loss(scores)
        row["ood"] = []
        for name, file in self.oods.items():
            ood = self._evaluate(file, limit=config.limit, score=self.baselines)
            row["ood"].append({"dataset": name} | out_of_domain(scores, ood))
        return row, scores

    def documents(self) -> dict[str, ScoredText]:
        """title -> the first document of the split and of the OOD text, token by token."""
        files = {"In domain": self.file}
        files |= {f"Out of domain: {name}": file for name, file in self.oods.items()}
        found = {}
        for title, file in files.items():
            ids = first_document(file, self.tokenizer.eot, SHOWN_TOKENS)
            scored = score_text(self.model, self.tokenizer, ids, self.n_samples)
            scored.percentiles = self.usual
            found[f"{title}: {file.path}"] = scored
        return found

    def _evaluate(self, file, text=None, limit=0, score=score_tokens, better=None):
        config = self.config
        n_windows = math.ceil((len(file) - 1) / self.stride)
        n_windows = min(n_windows, limit or n_windows)
        bar = tqdm(
            windows(file, self.block_size, config.batch_size, limit, self.stride),
            desc=f"{self.source}, {file.path}",
            total=math.ceil(n_windows / config.batch_size),
            leave=False,
            disable=None if self.processes.is_main else True,  # None: only in a terminal
        )
        return evaluate(
            self.model, bar, self.processes, self.cast, self.n_samples, text, score, better
        )
