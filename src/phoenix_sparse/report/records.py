"""What a run's JSON files hold, as far as the report shows it: one record a file, checked when read."""

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt


class Record(BaseModel):
    """A part of a file. A key that the report doesn't show is let through; NaN and infinity are not."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Stage(Record):
    status: str
    seconds: float | None = None
    begun: str = ""


class Host(Record):
    platform: str | None = None
    cpu: str | None = None
    cores: int | None = None
    gpu: str | None = None
    memory_bytes: int | None = None


class ModelInput(Record):
    path: str
    sha256: str | None = None


class TaskInput(Record):
    name: str
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    dropped_overlap: int | None = None


class Inputs(Record):
    """Both are missing in a run that stopped before it had read them."""

    model: ModelInput | None = None
    task: TaskInput | None = None


class Manifest(Record):
    phoenix: str
    name: str
    created: str
    git_commit: str | None = None
    versions: dict[str, str] = {}
    host: Host = Host()
    seed: int | None = None
    inputs: Inputs = Inputs()
    stages: dict[str, Stage] = {}


class Accuracy(Record):
    accuracy: float = Field(ge=0, le=1)
    stderr: float | None = Field(default=None, ge=0)
    metric: str
    task: str
    split: str
    examples: NonNegativeInt
    num_fewshot: NonNegativeInt
    seconds: float | None = None


class Prediction(Record):
    example: NonNegativeInt
    hash: str
    prompt: str
    target: str | int | list[str]
    prediction: str | int
    choices: list[str] | None = None
    output: str | None = None
    score: float

    @property
    def expected(self) -> str:
        return self._as_text(self.target)

    @property
    def answer(self) -> str:
        """What the model wrote, or the choice that it found likeliest."""
        return self._as_text(self.prediction) if self.output is None else self.output.strip()

    def _as_text(self, answer: str | int | list[str]) -> str:
        if self.choices and isinstance(answer, int) and 0 <= answer < len(self.choices):
            return self.choices[answer]
        return "; ".join(answer) if isinstance(answer, list) else str(answer).strip()


class AllAccuracies(Record):
    """Of one model on the run's own task and on those of evaluate.also."""

    tasks: dict[str, Accuracy]
    mean_accuracy: float = Field(ge=0, le=1)


class AllocatedLayer(Record):
    shape: tuple[int, int]
    nnz: NonNegativeInt
    sparsity: float = Field(ge=0, le=1)


class Allocation(Record):
    sparsity: float = Field(ge=0, le=1)
    method: str
    layers: dict[str, AllocatedLayer]
    importance: str | None = None
    update: str | None = None
    pattern: str | None = None
    group: str | None = None
    calibration_sequences: int | None = None
    calibration_length: int | None = None
    calibration_examples: int | None = None


class TuneStep(Record):
    step: NonNegativeInt
    loss: float | None = None


class Validation(Record):
    """The validation loss of a completion token along the training; the weights of the best step were kept."""

    curve: list[TuneStep]
    best_step: int
    stopped_early: bool
    examples: NonNegativeInt


class Tune(Record):
    log: list[TuneStep]
    resumed_from: int | None = None
    steps: int | None = None
    examples: int | None = None
    examples_left_out: NonNegativeInt | None = None
    tokens: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    validation: Validation | None = None


class Candidate(Record):
    id: int | str
    origin: str
    ranks: dict[str, int]
    accuracy: float = Field(ge=0, le=1)
    stderr: float | None = Field(default=None, ge=0)
    parameters: NonNegativeInt
    seconds: float | None = None


class Search(Record):
    space: list[int] | dict[str, list[int]]
    method: str
    budget: int
    validation_examples: int
    candidates: list[Candidate]
    front: list[int | str]
    choice: int | str
    rule: str

    @property
    def ranks_tried(self) -> str:
        """The ranks of all layers, or the different ranks that there are, the largest first."""
        kinds = list(self.space.values()) if isinstance(self.space, dict) else [self.space]
        return " or ".join(dict.fromkeys(", ".join(map(str, ranks)) for ranks in sorted(kinds, reverse=True)))


class CertifiedLayer(Record):
    sparsity: float = Field(ge=0, le=1)
    mask_sparsity: float = Field(ge=0, le=1)
    nnz: NonNegativeInt


class Certificate(Record):
    off_mask_nonzeros: NonNegativeInt
    max_abs_logit_difference: float
    logits_compared: NonNegativeInt
    argmax_agreement: float = Field(ge=0, le=1)
    sparsity: float = Field(ge=0, le=1)
    layers: dict[str, CertifiedLayer]
    masks_sha256: str
    adapter_sha256: str
    merged_sha256: str
    dtype: str
    mode: str


class Cost(Record):
    dense: float
    sparse: float
    reduction: float | None


class Prefill(Record):
    linears: Cost
    lm_head: Cost
    attention: float
    total: Cost
    per_token: Cost


class Decode(Record):
    linears: Cost
    lm_head: Cost
    attention: float
    total: Cost


class Parameters(Record):
    total: int
    nnz: int
    density: float


class Bytes(Record):
    dense: int
    nonzero_values: int
    nonzero_values_and_bitmask: int
    kv_cache: int


class Rate(Record):
    tokens_per_second: float = Field(gt=0)
    bound: str


class Rates(Record):
    prefill: Rate
    decode: Rate


class Projection(Record):
    """None where the weights don't fit the machine's memory."""

    system: str
    batch: int
    dense: Rates | None
    packed: Rates | None


class Projected(Record):
    note: str
    rows: list[Projection]


class Flops(Record):
    convention: str
    prompt_length: int
    context_length: int
    prefill: Prefill
    decode: Decode
    parameters: Parameters
    bytes: Bytes
    projected: Projected | None = None


class Perplexity(Record):
    perplexity: float
    context_length: int
    tokens: int
    text: str
