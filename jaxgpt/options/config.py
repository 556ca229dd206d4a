"""Every option: its type, its default and what it means.

`Config` is what a run is made from. A TOML file in `configs/` holds what differs from the defaults here, and the
command line overrides both; reading and checking them is `settings.py`'s work. Everything here is plain, immutable
data, so that a part of it can be a static argument of a jitted function.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxgpt.options.objective import Lora, Objective, Rollouts

IN_DATA = -2  # a document_start: the data say where each document begins
SPIKE_WINDOW = 128  # steps among which a loss or a gradient's norm is seen to be a spike


@dataclass(frozen=True)
class Model:
    """The model's shape."""

    layers: int = 12
    """Number of transformer blocks (L)."""
    heads: int = 12
    """Number of attention heads (H); the width is divided among them."""
    width: int = 768
    """Width of the residual stream (C)."""
    context: int = 1024
    """Longest sequence the model has positions for."""
    vocabulary_size: int = 0
    """Number of tokens (V); 0 takes the tokenizer's. Stored padded to a multiple of 128."""
    document_start: int = -1
    """The token that begins a document, where each is a sequence of its own; --data.document-mask takes the
    tokenizer's. -1 for none, -2 where the data say where each begins, as prepared conversations do."""
    dropout: float = 0.0
    """Share that training drops of the embedding's output, attention's probabilities and both residual branches."""
    family: Literal["gpt2", "llama", "mixtral"] = "gpt2"
    """Whose blocks the model is made of: GPT-2's, Llama's (and Mistral's and Qwen3's), or Mixtral's. GPT-2 has none of
    the options below."""
    kv_heads: int = 0
    """Number of key and value heads (K), each shared by heads / kv_heads query heads; 0 for as many as heads."""
    head_width: int = 0
    """Width of a head (D); 0 for width / heads."""
    feed_forward: int = 0
    """Width of the MLP (F), of each expert in a mixture; 0 for two thirds of 4 width, rounded up to a multiple of
    32."""
    window: int = 0
    """Number of newest tokens that a token attends to, itself among them (sliding window); 0 for all."""
    tied: bool = False
    """The token table is the head too."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    query_key_norm: bool = False
    """Normalise each head's query and key by RMSNorm before they are turned, as Qwen3 does."""
    logit_soft_cap: float = 0.0
    """Keep the logits between -cap and cap by cap tanh(logit / cap); 0 for no cap."""
    rope_base: float = 10_000.0
    """Base of the rotary positions' frequencies."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """Scaling of these frequencies for a context longer than was trained: all divided by the factor ("linear"), or only
    the slow ones (Llama 3.1)."""
    rope_factor: float = 8.0
    """Factor of the scaling."""
    rope_low_frequency: float = 1.0
    """llama3: frequencies with fewer turns than this in the original context are divided by the factor."""
    rope_high_frequency: float = 4.0
    """llama3: frequencies with more turns than this in the original context stay."""
    rope_original_context: int = 8192
    """llama3: the context before the scaling."""
    experts: int = 0
    """Number of experts in a mixture (E); Mixtral's family only."""
    experts_per_token: int = 2
    """Number of experts that each token goes to."""
    router_softmax: Literal["after", "before"] = "after"
    """Softmax of the router's scores over the chosen experts, after the choice (Mixtral), or over all, before it."""
    router_balance: float = 0.01
    """Coefficient of the loss that keeps the experts' loads alike."""
    router_z: float = 0.0
    """Coefficient of the loss that keeps the router's scores small (z-loss)."""

    @property
    def documents_apart(self) -> bool:
        """Returns whether a sequence has several documents, each with attention and positions of its own."""
        return self.document_start != -1

    @property
    def padded_vocabulary_size(self) -> int:
        """Returns Vp, the vocabulary size rounded up to a multiple of 128."""
        return -(-self.vocabulary_size // 128) * 128

    @property
    def key_value_heads(self) -> int:
        """Returns K, the number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def width_per_head(self) -> int:
        """Returns D, the width of a head."""
        return self.head_width or self.width // self.heads


@dataclass(frozen=True)
class Compute:
    """Computation of the model: none of these changes what is computed, beyond rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations and of the copy of the weights that they meet; moments are float32 always."""
    parameters: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters that are kept. "bfloat16" halves their memory: there are no float32 masters, and each
    update is rounded up or down at random, right on average."""
    products: Literal["dtype", "fp8"] = "dtype"
    """Type of the factors of the blocks' products with their weights in training: `dtype`, or 8 bits (e4m3, and e5m2
    for gradients), which an NVIDIA GPU since Ada and Hopper multiplies twice as fast as bfloat16."""
    fp8_scaling: Literal["delayed", "current"] = "delayed"
    """How a tensor is scaled to 8 bits: by the largest magnitude that it had in the last steps, or by its own, for
    which it is read once more."""
    fp8_history: int = 16
    """Number of last steps of which delayed scaling takes the largest magnitudes."""
    fp8_head: bool = False
    """The classifier's products too have factors of 8 bits, scaled by their own magnitudes; of the next token alone."""
    fp8_error_every: int = 100
    """Steps between measurements of how far the gradient by products of 8 bits is from that by `dtype`; 0 for none."""
    deterministic: bool = False
    """The same bits from the same seed on a GPU too, where some kernels are then slower ones; a CPU's always are."""
    classifier_chunk: int = 2048
    """Number of tokens whose logits exist at once."""
    attention: Literal["auto", "blocks", "cudnn", "pallas"] = "auto"
    """cuDNN's fused kernel (an NVIDIA GPU, bfloat16), or blocks of queries; auto takes the kernel where it can run.
    "pallas" is the project's own fused kernels, which also take float32 and documents; no GPU has run them yet."""
    kernels: Literal["xla", "pallas"] = "xla"
    """Kernels of the norms and of the classifier's softmax: XLA's, or the project's own fused kernels, which need an
    NVIDIA GPU and read and write less memory; no GPU has run them yet."""
    attention_block: int = 256
    """Number of queries whose attention scores exist at once, where attention runs in blocks."""
    recompute: Literal["none", "gelu", "norms", "projection", "block", "auto"] = "norms"
    """What the backward computes again rather than keeps (gradient checkpointing): nothing, GELU's output, that and
    LayerNorm's outputs, also the projection of attention's output, or all of a block but its input. Less memory in this
    order, and more time; "auto" takes the first of them that fits."""
    layers: Literal["auto", "scanned", "unrolled"] = "auto"
    """"scanned" compiles one layer and loops over them; "unrolled" compiles each, which takes longer, and then runs
    faster in less memory, since nothing is copied into and out of stacks. "auto" unrolls up to 24 layers, on a GPU 48,
    and on a TPU none."""
    memory_limit_gib: float = 0.0
    """Device memory, in GiB, that a run may plan with; 0 takes all that the device has, or that the system has left."""
    fit: str = ""
    """Choose what fits a device's memory, the fastest first: "device" for what it has, or a size such as 24GB or 22GiB.
    Free are the micro-batches (a step's sequences stay), recompute, classifier-chunk, zero and moments, but for what
    stands on the command line or in the --config. Empty chooses nothing."""
    fit_keeps: tuple[str, ...] = ()
    """Options that fit leaves as they are, such as compute.recompute. The command line and the --config add theirs."""
    measure_peak: bool = False
    """On a CPU, whose peak nobody states: time a large product at the start, in about a second, so that MFU shows."""


@dataclass(frozen=True)
class Parallel:
    """Training on several devices, each with its part of every micro-batch's sequences."""

    devices: int = 0
    """Number of devices, of all processes together; 0 takes all there are."""
    zero: Literal[0, 1, 2, 3] = 0
    """What is sharded over the devices, so that each needs less memory: nothing (0), master weights and moments (1),
    gradients as well (2), the parameters as well, which are all-gathered layer by layer (3)."""
    moments: Literal["device", "host"] = "device"
    """Memory that the optimizer's moments are in: "host" is the host's, from which a GPU or TPU takes them for each
    update: less device memory, and more time."""
    reproducible: bool = False
    """The same parameters to the last bit on 1, 2, 4 and 8 devices, for a price in time. Needs zero = 0, and a batch
    size divisible by 8."""
    processes: int = 0
    """Number of processes that train together, each with its own devices, on one machine or several. 0 asks Slurm,
    Open MPI and Kubernetes, and is 1 where none of them started this one."""
    process: int = -1
    """This process's number among them, from 0; only where `processes` is given."""
    coordinator: str = ""
    """host:port, where the processes meet: the machine of process 0, and a port that is free there. Empty takes what
    the cluster says."""


@dataclass(frozen=True)
class Data:
    """Text to train on, and how it becomes tokens."""

    text: str = "embedded"
    """"embedded" (English that ships with Python), "tinyshakespeare", the path of a UTF-8 text file; or token files: a
    folder that `run.py prepare` made, a pattern of llm.c's, or a data set by name such as fineweb-10B. For reward and
    preference (--objective.name): files of JSON lines with comparisons, a folder or a pattern of them; for policy, with
    problems."""
    mixture: str = ""
    """Several of these instead of `text`, with the share of the sequences that comes from each, such as
    data/web=0.8, data/books=0.2."""
    tokenizer: Literal["gpt2", "characters", "bytes", "cl100k", "o200k", "llama3"] = "gpt2"
    """GPT-2's byte-pair encoding, the characters of the text, bytes, GPT-4's, GPT-4o's or Llama 3's. What `run.py
    prepare` made has its own."""
    document_mask: bool = False
    """Attend to no token of another document, and count positions from the beginning of each. While training and
    validating; a text that is drawn goes on beyond the end of a document."""
    validation_fraction: float = 0.1
    """Share of a text, at its end, that is kept for validation, or of the lines of comparisons, spread over them; token
    files have their own for it."""
    skip_bad: int = 0
    """Number of bad lines of comparisons, or of problems, that may be left out."""


@dataclass(frozen=True)
class Training:
    """Length of the training, and the size of its batches."""

    steps: int = 1000
    """Number of optimizer steps."""
    batch_size: int = 8
    """Number of sequences in a micro-batch (B)."""
    micro_batches: int = 1
    """Number of micro-batches whose gradients are accumulated for one step."""
    sequence_length: int = 0
    """Tokens in a sequence (T); 0 takes the model's context."""
    seed: int = 0
    """Random seed of the initial weights, the order of the data and the samples."""
    init_from: str = ""
    """Begin with these weights rather than random ones: a run's folder, a checkpoint, a Hugging Face folder or model
    name, a file of llm.c, llama2.c or llama.cpp (GGUF). The model's shape and tokenizer are theirs.
    Shorter: --init-from."""
    evaluate_every: int = 250
    """Steps between validation losses; 0 evaluates at the end only."""
    patience: int = 0
    """Stop early, after so many validation losses in a row that are no lower than before; 0 never."""
    evaluation_batches: int = 0
    """Batches of a validation loss; 0 takes the whole validation split."""
    stop_after_nonfinite: int = 1
    """Stop when loss or gradient has been NaN or infinite this many steps in a row. Such steps change nothing."""
    loss_spike_z: float = 0.0
    """Skip a step whose loss is more than this many standard deviations above the mean of the last 128; 0 skips
    none."""
    grad_norm_spike_z: float = 0.0
    """The same for the norm of the gradient."""


@dataclass(frozen=True)
class Evaluation:
    """Tasks that a run is scored on, at its start and its end and in between."""

    tasks: str = ""
    """TASK=FILE, several apart by commas, such as hellaswag=val.jsonl,gsm8k=test.jsonl; a multiple-choice TASK alone is
    downloaded."""
    every: int = 0
    """Steps between; 0 evaluates at the start and the end only."""
    limit: int = 0
    """Take only this many of a task's examples, from the first; 0 takes all."""
    batch_size: int = 16
    """Number of choices that each device scores at once, and of answers that are drawn side by side."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW or Muon, clipping, and the learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon for the blocks' matrices, and AdamW for all else."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    muon_learning_rate: float = 0.0
    """Peak learning rate of Muon's matrices; 0 takes the same, since their updates are as large as AdamW's."""
    momentum: float = 0.95
    """Decay of the running mean of the gradients of Muon's matrices."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after warm-up; wsd is constant until 80% of the steps and then falls as 1 - √ of the rest."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    final_fraction: float = 0.0
    """The last learning rate, as a share of the peak."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrix-shaped parameters."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 never clips."""


@dataclass(frozen=True)
class Sampling:
    """Drawing of text from the model."""

    tokens: int = 200
    """Number of tokens to draw."""
    temperature: float = 0.8
    """Divides the logits: below 1 bolder, above 1 more varied, 0 always the likeliest."""
    top_k: int = 0
    """Draw only among this many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw only among the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Draw only among tokens that have at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the text has already become less likely: their logits are divided by it, or multiplied where
    negative."""
    stop: tuple[str, ...] = ()
    """Texts that end what is drawn, and are not part of it."""


@dataclass(frozen=True)
class Checkpoint:
    """Times at which the run is saved, and checkpoints that are kept. The end of a run is always saved."""

    every_steps: int = 0
    """Steps between checkpoints; 0 saves by the clock only."""
    every_minutes: float = 15.0
    """Minutes between checkpoints; 0 saves by steps only."""
    keep_last: int = 2
    """Number of newest checkpoints that are kept."""
    keep_best: bool = False
    """Save after each validation loss that is lower than all before, and keep that checkpoint: RUN/checkpoints/best."""
    keep_every: int = 0
    """Keep for good the first checkpoint at or after every multiple of this many steps; 0 keeps only the newest."""
    stop_minutes_before_end: float = 5.0
    """Save and stop this long before the end of a Slurm allocation ($SLURM_JOB_END_TIME); 0 trains on to its end."""


@dataclass(frozen=True)
class Run:
    """Name, folder and files of the run."""

    name: str = ""
    """The run's folder is `folder`/`name`; empty takes the name of the config."""
    folder: str = "runs"
    """Where the runs are."""
    overwrite: bool = False
    """Replace a run of the same name; without it, such a run is left alone and the command ends."""
    resume: Literal["never", "always", "auto"] = "never"
    """"always" goes on from the last good checkpoint of the run of this name, "auto" does so if there is one and else
    begins anew. Shorter: --resume, --resume auto."""
    note: str = ""
    """A line to print at the start."""
    verbose: bool = False
    """Print at the start all that start.txt in the run's folder says, as the memory plan by its parts. Shorter:
    --verbose."""
    prompt: str = ""
    """Text that the samples before and after training begin with; empty takes the token that begins a text, and for
    tokenizers without one a sentence of the validation text."""
    sample_every: int = 0
    """Steps between samples while training; 0 draws them at the start and the end only."""
    report: bool = True
    """Write report.html, a page that shows how the run is doing, while it goes on and at its end."""
    trackers: str = ""
    """"tensorboard", "wandb" or both, apart by a comma: where the numbers of metrics.jsonl go as well."""
    compilation_cache: str = ""
    """Where compiled programs are kept, so that the next start is fast; empty is in the user's cache folder, off
    nowhere. Only the command line names a folder, since what is in it is run."""


@dataclass(frozen=True)
class Config:
    """All of a run's options."""

    model: Model = field(default_factory=Model)
    compute: Compute = field(default_factory=Compute)
    parallel: Parallel = field(default_factory=Parallel)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    objective: Objective = field(default_factory=Objective)
    rollouts: Rollouts = field(default_factory=Rollouts)
    lora: Lora = field(default_factory=Lora)
    evaluation: Evaluation = field(default_factory=Evaluation)
    optimizer: Optimizer = field(default_factory=Optimizer)
    sampling: Sampling = field(default_factory=Sampling)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    run: Run = field(default_factory=Run)
