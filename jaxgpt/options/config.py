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
    """Longest sequence that the model takes, in tokens."""
    vocabulary_size: int = 0
    """Number of tokens in the vocabulary (V); 0 takes the tokenizer's. The tables are padded to a multiple of 128."""
    document_start: int = -1
    """Number of the token that begins a document, where documents don't attend to each other; --data.document-mask
    takes the tokenizer's. -1 for none; -2 where the data mark each beginning, as prepared conversations do."""
    dropout: float = 0.0
    """Share of values that training drops, of the embedding's output, attention's probabilities and both residual
    branches."""
    family: Literal["gpt2", "llama", "mixtral"] = "gpt2"
    """Kind of transformer block: GPT-2's, Llama's (and Mistral's and Qwen3's), or Mixtral's. GPT-2 has none of the
    options below."""
    kv_heads: int = 0
    """Number of key and value heads (K), each shared by heads / kv_heads query heads; 0 for as many as heads."""
    head_width: int = 0
    """Width of a head (D); 0 for width / heads."""
    feed_forward: int = 0
    """Width of the MLP (F), or of each expert in a mixture; 0 for two thirds of 4 width, rounded up to a multiple of
    32."""
    window: int = 0
    """Number of newest tokens that a token attends to, itself among them (sliding window); 0 for all."""
    tied: bool = False
    """Use the token table as the head too."""
    norm_epsilon: float = 1e-5
    """Number added to the mean square in RMSNorm."""
    query_key_norm: bool = False
    """Normalise each head's query and key by RMSNorm before the rotary positions, as Qwen3 does."""
    logit_soft_cap: float = 0.0
    """Keep the logits between -cap and cap by cap tanh(logit / cap); 0 for no cap."""
    rope_base: float = 10_000.0
    """Base of the rotary positions' frequencies."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """Scaling of the rotary frequencies for a context longer than was trained: all are divided by the factor
    ("linear"), or only the slow ones (Llama 3.1)."""
    rope_factor: float = 8.0
    """Factor by which rope-scaling divides frequencies."""
    rope_low_frequency: float = 1.0
    """llama3: number of turns in the original context below which a frequency is divided by the factor."""
    rope_high_frequency: float = 4.0
    """llama3: number of turns in the original context above which a frequency stays as it is."""
    rope_original_context: int = 8192
    """llama3: context before the scaling, in tokens."""
    experts: int = 0
    """Number of experts in a mixture (E); only in Mixtral's family."""
    experts_per_token: int = 2
    """Number of experts that each token goes to."""
    router_softmax: Literal["after", "before"] = "after"
    """Softmax of the router's scores: over the chosen experts, after the choice (Mixtral), or over all experts, before
    it."""
    router_balance: float = 0.01
    """Coefficient of the loss that keeps the experts' loads even."""
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
    """Type of the activations, and of the weights in products with them; moments are always float32."""
    parameters: Literal["float32", "bfloat16"] = "float32"
    """Type in which the parameters are stored. "bfloat16" halves their memory: there are no float32 masters, and each
    update is rounded up or down at random, so that it is right on average."""
    products: Literal["dtype", "fp8"] = "dtype"
    """Type of the factors in the blocks' products with their weights, in training: `dtype`, or 8 bits (e4m3, and e5m2
    for gradients), which NVIDIA GPUs since Ada and Hopper multiply twice as fast as bfloat16."""
    fp8_scaling: Literal["delayed", "current"] = "delayed"
    """Scale of a tensor in 8 bits: "delayed" takes the largest magnitude of the last steps, "current" that of the
    tensor itself, which is read once more for it."""
    fp8_history: int = 16
    """Number of last steps whose largest magnitude delayed scaling takes."""
    fp8_head: bool = False
    """Use factors of 8 bits in the classifier's products too, scaled by their own magnitudes; only for next-token
    training."""
    fp8_error_every: int = 100
    """Steps between comparisons of the gradient by 8-bit products with the gradient by `dtype`; 0 for none."""
    deterministic: bool = False
    """Get the same bits from the same seed on a GPU too, where some kernels are then slower; a CPU always does."""
    classifier_chunk: int = 2048
    """Number of tokens whose logits are in memory at once."""
    attention: Literal["auto", "blocks", "cudnn", "pallas"] = "auto"
    """Attention: cuDNN's fused kernel (an NVIDIA GPU, bfloat16), or blocks of queries; auto takes the kernel where it
    can run. "pallas" is the project's own fused kernels, which also take float32 and documents; no GPU has run them
    yet."""
    kernels: Literal["xla", "pallas"] = "xla"
    """Kernels of the norms and of the classifier's softmax: XLA's, or the project's own fused kernels, which need an
    NVIDIA GPU and read and write less memory; no GPU has run them yet."""
    attention_block: int = 256
    """Number of queries whose attention scores are in memory at once, where attention runs in blocks."""
    recompute: Literal["none", "gelu", "norms", "projection", "block", "auto"] = "norms"
    """Activations that the backward pass computes again instead of keeping them (gradient checkpointing): none; GELU's
    output; also LayerNorm's outputs; also the projection of attention's output; or all of a block but its input. Each
    takes less memory and more time than the one before; "auto" takes the first that fits."""
    layers: Literal["auto", "scanned", "unrolled"] = "auto"
    """Form of the layers: "scanned" compiles one layer and loops over it; "unrolled" compiles each layer, which takes
    longer, and then runs faster in less memory, since nothing is copied into and out of stacks. "auto" unrolls up to
    24 layers, on a GPU 48, and on a TPU none."""
    memory_limit_gib: float = 0.0
    """Device memory that a run may plan with, in GiB; 0 takes all that the device has, or that the system has left."""
    fit: str = ""
    """Choose the fastest settings that fit a device's memory: "device" for all that it has, or a size such as 24GB or
    22GiB. It may change micro-batches (a step's sequences stay), recompute, classifier-chunk, zero and moments, unless
    the command line or the --config sets them. Empty chooses nothing."""
    fit_keeps: tuple[str, ...] = ()
    """Options that fit leaves as they are, such as compute.recompute, beside those that the command line and the
    --config set."""
    measure_peak: bool = False
    """Measure a CPU's peak at the start, by timing a large product for about a second, so that MFU can be shown."""


@dataclass(frozen=True)
class Parallel:
    """Training on several devices, each with its part of every micro-batch's sequences."""

    devices: int = 0
    """Number of devices, of all processes together; 0 takes all there are."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: tensors that are sharded over the devices, so that each device needs less memory. 0 shards nothing,
    1 master weights and moments, 2 gradients as well, 3 the parameters as well, which are all-gathered layer by
    layer."""
    moments: Literal["device", "host"] = "device"
    """Memory that holds the optimizer's moments. "host" keeps them in the host's memory, from which a GPU or TPU takes
    them for each update: less device memory, and more time."""
    reproducible: bool = False
    """Get the same parameters, to the last bit, on 1, 2, 4 and 8 devices, at a cost in time. Needs zero = 0, and a
    batch size divisible by 8."""
    processes: int = 0
    """Number of processes that train together, each with its own devices, on one machine or several. 0 asks Slurm,
    Open MPI and Kubernetes, and means 1 if none of them started this process."""
    process: int = -1
    """This process's number among them, from 0; only if `processes` is given."""
    coordinator: str = ""
    """Address at which the processes meet, as host:port: the machine of process 0, and a port that is free there.
    Empty takes the cluster's."""


@dataclass(frozen=True)
class Data:
    """Text to train on, and how it becomes tokens."""

    text: str = "embedded"
    """Data to train on: "embedded" (English that ships with Python), "tinyshakespeare", the path of a UTF-8 text file;
    or token files: a folder that `run.py prepare` made, a pattern of llm.c's, or a data set by name such as
    fineweb-10B. For reward and preference (--objective.name): files of JSON lines with comparisons, a folder or a
    pattern of them; for policy, with problems."""
    mixture: str = ""
    """Several data sets instead of `text`, each with its share of the sequences, such as data/web=0.8,
    data/books=0.2."""
    tokenizer: Literal["gpt2", "characters", "bytes", "cl100k", "o200k", "llama3"] = "gpt2"
    """Tokenizer of a text: GPT-2's byte-pair encoding, the characters of the text, bytes, GPT-4's, GPT-4o's or Llama
    3's. Token files of `run.py prepare` have their own."""
    document_mask: bool = False
    """Keep tokens from attending to other documents, and count positions from the beginning of each. This holds for
    training and validation; generated text goes on beyond the end of a document."""
    validation_fraction: float = 0.1
    """Share of a text that is kept for validation: its end, or lines of comparisons spread over the file. Token files
    have validation files of their own."""
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
    """Number of tokens in a sequence (T); 0 takes the model's context."""
    seed: int = 0
    """Random seed of the initial weights, the order of the data and the samples."""
    init_from: str = ""
    """Weights to begin with, instead of random ones: a run's folder, a checkpoint, a Hugging Face folder or model
    name, a file of llm.c, llama2.c or llama.cpp (GGUF). The model's shape and tokenizer come with them. Shorter:
    --init-from."""
    evaluate_every: int = 250
    """Steps between validation losses; 0 computes one at the end only."""
    patience: int = 0
    """Number of validation losses in a row without a new lowest one, after which training stops early; 0 for never."""
    evaluation_batches: int = 0
    """Number of batches in a validation loss; 0 takes the whole validation split."""
    stop_after_nonfinite: int = 1
    """Number of steps in a row with a NaN or infinite loss or gradient, after which training stops. Such steps change
    nothing."""
    loss_spike_z: float = 0.0
    """Number of standard deviations above the mean of the last 128 losses at which a step is skipped as a spike; 0
    skips none."""
    grad_norm_spike_z: float = 0.0
    """Number of standard deviations above the mean of the last 128 gradient norms at which a step is skipped; 0 skips
    none."""


@dataclass(frozen=True)
class Evaluation:
    """Tasks that a run is scored on, at its start and its end and in between."""

    tasks: str = ""
    """Tasks to score the model on while it trains, as TASK=FILE, separated by commas, such as
    hellaswag=val.jsonl,gsm8k=test.jsonl. A multiple-choice TASK without a file is downloaded."""
    every: int = 0
    """Steps between evaluations on the tasks; 0 evaluates at the start and the end only."""
    limit: int = 0
    """Number of examples taken of each task, from the first; 0 takes all."""
    batch_size: int = 16
    """Number of choices that each device scores at once, and of answers that are drawn side by side."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW or Muon, clipping, and the learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer: AdamW; or Muon for the blocks' matrices, and AdamW for all else."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    muon_learning_rate: float = 0.0
    """Peak learning rate of Muon's matrices; 0 takes learning-rate, since their updates are scaled to AdamW's size."""
    momentum: float = 0.95
    """Decay of the running mean of the gradients of Muon's matrices."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after the warm-up; wsd is constant until 80% of the steps and then falls as 1 - √ of
    the rest."""
    warmup_steps: int = 0
    """Number of steps over which the learning rate rises linearly to its peak."""
    final_fraction: float = 0.0
    """Last learning rate, as a share of the peak."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    epsilon: float = 1e-8
    """Number added to the root of the second moment."""
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
    """Temperature, which divides the logits: below 1 for likelier tokens, above 1 for more variety, 0 for always the
    likeliest."""
    top_k: int = 0
    """Number of likeliest tokens to draw among; 0 for all."""
    top_p: float = 1.0
    """Total probability of the likeliest tokens to draw among; 1 for all."""
    min_p: float = 0.0
    """Least probability of a token, as a share of the likeliest one's, for it to be drawn."""
    repetition_penalty: float = 1.0
    """Number by which the logits of tokens that the text already has are divided, or multiplied where negative; above
    1 it makes them less likely."""
    stop: tuple[str, ...] = ()
    """Texts at which drawing stops; they are not printed."""


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
    """Save after each validation loss that is lower than all before, and keep that checkpoint:
    RUN/checkpoints/best."""
    keep_every: int = 0
    """Steps between checkpoints that are kept for good: the first at or after each multiple; 0 keeps only the
    newest."""
    stop_minutes_before_end: float = 5.0
    """Minutes before the end of a Slurm allocation ($SLURM_JOB_END_TIME) at which the run saves and stops; 0 trains on
    to its end."""


@dataclass(frozen=True)
class Run:
    """Name, folder and files of the run."""

    name: str = ""
    """Name of the run, whose folder is `folder`/`name`; empty takes the name of the config."""
    folder: str = "runs"
    """Folder that holds the runs."""
    overwrite: bool = False
    """Replace a run of the same name; without it, such a run is left alone and the command ends."""
    resume: Literal["never", "always", "auto"] = "never"
    """Resuming of the run of this name: "always" does so from its last good checkpoint; "auto" does so if there is
    one, and begins anew if not. Shorter: --resume, --resume auto."""
    note: str = ""
    """Line to print at the start."""
    verbose: bool = False
    """Print at the start everything that start.txt in the run's folder has, such as the parts of the memory plan.
    Shorter: --verbose."""
    prompt: str = ""
    """Text that the samples before, during and after training begin with; empty takes the token that begins a text,
    or, for a tokenizer without one, a sentence of the validation text."""
    sample_every: int = 0
    """Steps between samples of text; 0 draws them at the start and the end only."""
    report: bool = True
    """Write report.html, a page that shows how the run is doing, during the run and at its end."""
    trackers: str = ""
    """Trackers that get the numbers of metrics.jsonl as well: "tensorboard", "wandb" or both, separated by a comma."""
    compilation_cache: str = ""
    """Folder for compiled programs, so that the next start is fast; empty takes one in the user's cache folder, off
    keeps none. Only the command line can name a folder, since the programs in it are run."""


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
