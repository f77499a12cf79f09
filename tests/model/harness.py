"""The model inside SGLang's own scheduler, in a process of its own, asked for logprobs.

SGLang keeps its configuration, process groups and platform in module globals, so the test process
stays free of it: one child process holds one model at a time, and everything that a server does
between tokenizer and detokenizer happens there (image processing and encoder, chunked prefill,
radix cache, paged cache, sampling).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import traceback
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_bytes import LoadMemory, measured

from step37_kernels import dispatch, interpret

CHUNK = 192
"""Longer prompts are prefilled in several forward passes."""

# float32 everywhere, so that nothing but the last bits of float32 differs from transformers.
_FLAGS = (
    "--device cpu --model-impl step37 --dtype float32 --max-total-tokens 4096 "
    "--max-running-requests 4 --mem-fraction-static 0.3 --disable-overlap-schedule "
    f"--chunked-prefill-size {CHUNK} --log-level error"
)


@dataclass(frozen=True)
class Request:
    """One prompt: token ids, or text with one `<im_patch>` per picture (data URLs).

    Attributes:
        new_tokens: tokens to generate greedily; the end of the turn does not stop it.
        prompt_logprobs: also return those of the prompt's tokens, which are then all computed
            and not taken from the radix cache.
    """

    prompt: list[int] | str
    new_tokens: int = 8
    prompt_logprobs: bool = True
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        prompt: the prompt's token ids, pictures expanded.
        tokens: generated token ids.
        logprobs: natural logarithms, of `prompt[1:]` (if asked for) and then of `tokens`.
        cached: prompt tokens whose keys and values were found in the radix cache.
        forward_passes: of the model, for all requests that ran together.
        verifications: passes in which drafts of this request were verified.
        pixels: the pictures as the encoder got them: global views, and crops if there are any.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    cached: int
    forward_passes: int
    verifications: int
    pixels: list[torch.Tensor]


Mutation = Callable[[pytest.MonkeyPatch, Any], None]
"""Changes one decoder layer of the loaded model for as long as the patches hold; importable."""

Stored = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer the bytes of all keys and of all values as the cache holds them, `[T, Hkv, D]`."""


@dataclass(frozen=True)
class DraftPass:
    """One pass of one draft model over T positions of one sequence.

    Attributes:
        layer: the MTP layer's number in the checkpoint.
        tokens, positions: int `[T]`.
        before, hidden: `[T, hidden]`, of the step before and for the next one.
        logits: `[1, vocabulary]`, of the position whose draft is asked for.
    """

    layer: int
    tokens: torch.Tensor
    positions: torch.Tensor
    before: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor


class Worker:
    """The child process: `load` a checkpoint, then `ask` it."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, end = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(end,))
        self._process.start()
        end.close()
        self._loaded: tuple[Path, str, str, str] | None = None

    def load(
        self, folder: Path, flags: str = "", implementation: str = "reference", dense: str = "bf16"
    ) -> None:
        """Load the checkpoint in `folder` with these server arguments, unless it is loaded.

        Args:
            implementation: value of STEP37_IMPL: which one runs every operation that has it.
            dense: value of STEP37_DENSE_WEIGHTS.
        """
        wanted = (folder, flags, implementation, dense)
        if self._loaded != wanted:
            self._loaded = None
            self._call(_Child.load, *wanted)
            self._loaded = wanted

    def implementations(self) -> dict[str, set[str]]:
        """Which implementations of each operation the layers of the loaded model call."""
        return self._call(_Child.implementations)

    def load_memory(self, folder: Path, flags: str, implementation: str) -> LoadMemory:
        """What loading the checkpoint in `folder` takes."""
        self._loaded = None
        return self._call(_Child.load_memory, folder, flags, implementation, "bf16")

    def stored_types(self) -> dict[str, torch.dtype]:
        """The type of every parameter of the loaded text model, by name."""
        return self._call(_Child.stored_types)

    def ask(self, *requests: Request) -> list[Answer]:
        """Answers to `requests`, which run as one batch, with an empty radix cache before them."""
        return self._call(_Child.ask, requests)

    def ask_in_turn(self, *turns: Request | tuple[Request, ...]) -> list[Answer]:
        """As `ask`, a batch at each turn: later ones find the earlier ones' prefixes."""
        return self._call(_Child.ask_in_turn, turns)

    def ask_and_read_cache(
        self, request: Request, mutation: Mutation | None = None
    ) -> tuple[Answer, Stored]:
        """The answer to one request, with what was written to the KV cache for it.

        With a `mutation`, of the model whose every layer it has changed.
        """
        return self._call(_Child.ask_and_read_cache, request, mutation)

    def ask_and_read_drafts(self, request: Request) -> tuple[Answer, list[DraftPass]]:
        """The answer to one request, with every pass of the draft models for it."""
        return self._call(_Child.ask_and_read_drafts, request)

    def ask_without_lengths_on_the_host(self, *requests: Request) -> list[Answer]:
        """As `ask` with drafts, where no verification knows the lengths but from the device.

        SGLang's overlapped schedule on a GPU leaves them out for a backend that needs none there.
        """
        return self._call(_Child.ask_without_lengths_on_the_host, requests)

    def close(self) -> None:
        self._pipe.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        self._pipe.send((function, args))
        try:
            error, result = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process with the model has died; see its stderr") from None
        if error:
            raise RuntimeError(f"in the process with the model:\n{error}")
        return result


def _serve(pipe: Any) -> None:
    """The child's main loop: run functions until the parent closes the pipe."""
    os.environ["SGLANG_PLATFORM"] = "step37_cpu"
    interpret.enable()  # for loads that ask for the kernels
    torch.set_num_threads(1)
    child = _Child()
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)  # SGLang leaves threads behind that wait on sockets for ever
        try:
            pipe.send((None, function(child, *args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))


class _Child:
    """The loaded model; SGLang is imported in its methods only."""

    def __init__(self) -> None:
        self.scheduler: Any = None
        self.images: Any = None
        self.running: list[Any] = []

    def load(self, folder: Path, flags: str, implementation: str, dense: str) -> None:
        os.environ[dispatch.ENVIRONMENT_VARIABLE] = implementation
        os.environ["STEP37_DENSE_WEIGHTS"] = dense
        from sglang.srt.distributed import parallel_state
        from sglang.srt.managers.scheduler import Scheduler
        from sglang.srt.plugins import load_plugins
        from sglang.srt.runtime_context import SpawnRanks, publish, reset_context
        from sglang.srt.server_args import PortArgs, prepare_server_args

        load_plugins()
        if self.scheduler is not None:
            self.scheduler = None
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
            reset_context()
        server_args = prepare_server_args(f"--model-path {folder} {_FLAGS} {flags}".split())
        server_args.resolve_once()
        ports = PortArgs.init_new(server_args)
        publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        self.scheduler = Scheduler(server_args, ports)
        self.scheduler.ingest_requests = self._stop_when_finished
        self.scheduler.idle_sleeper = None  # it would wait a second after each answer
        self.images = _image_processor(server_args, self.scheduler.model_config.hf_config)

    def load_memory(self, *arguments: Any) -> LoadMemory:
        from step37_ext.model.multimodal import Step37ForConditionalGeneration as Model
        from step37_kernels.formats import nvfp4_tiles

        memory: list[LoadMemory] = []
        with pytest.MonkeyPatch.context() as patch:
            # One expert at a time, as of a full-size layer it is one in fifty.
            patch.setattr(nvfp4_tiles, "_BYTES_AT_A_TIME", 1)
            patch.setattr(Model, "load_weights", measured(Model.load_weights, memory))
            self.load(*arguments)
        return memory[0]

    def stored_types(self) -> dict[str, torch.dtype]:
        model = self.scheduler.tp_worker.model_runner.model.language_model
        return {name: parameter.dtype for name, parameter in model.named_parameters()}

    def ask(self, requests: tuple[Request, ...]) -> list[Answer]:
        self.scheduler.flush_cache()
        return self._run(*requests)

    def implementations(self) -> dict[str, set[str]]:
        names: dict[str, set[str]] = {}
        for module in self.scheduler.tp_worker.model_runner.model.modules():
            for value in vars(module).values():
                if isinstance(value, dispatch.Implementation):
                    names.setdefault(value.operation, set()).add(value.name)
        return names

    def ask_in_turn(self, turns: tuple[Request | tuple[Request, ...], ...]) -> list[Answer]:
        self.scheduler.flush_cache()
        batches = [(turn,) if isinstance(turn, Request) else turn for turn in turns]
        return [answer for batch in batches for answer in self._run(*batch)]

    def ask_and_read_cache(
        self, request: Request, mutation: Mutation | None
    ) -> tuple[Answer, Stored]:
        self.scheduler.flush_cache()
        layers = self.scheduler.tp_worker.model_runner.model.language_model.model.layers
        with pytest.MonkeyPatch.context() as patch:
            written = _record_cache(patch)
            for layer in layers if mutation else []:
                mutation(patch, layer)
            (answer,) = self._run(request)
        return answer, _by_layer(written, len(layers))

    def ask_and_read_drafts(self, request: Request) -> tuple[Answer, list[DraftPass]]:
        from step37_ext.model.mtp import Step37MTP

        self.scheduler.flush_cache()
        passes: list[DraftPass] = []
        forward = Step37MTP.forward

        def forward_and_note(model, input_ids, positions, forward_batch):
            tokens = input_ids.clone()  # SGLang moves them on in place
            before = forward_batch.spec_info.hidden_states.clone()
            output = forward(model, input_ids, positions, forward_batch)
            passes.append(
                DraftPass(
                    model.layer,
                    tokens,
                    positions.clone(),
                    before,
                    output.hidden_states.clone(),
                    output.next_token_logits.clone(),
                )
            )
            return output

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Step37MTP, "forward", forward_and_note)
            (answer,) = self._run(request)
        return answer, passes

    def ask_without_lengths_on_the_host(self, requests: tuple[Request, ...]) -> list[Answer]:
        from sglang.srt.speculative.multi_layer_eagle_worker_v2 import (
            MultiLayerEagleWorkerV2 as EagleWorker,
        )

        forward = EagleWorker.forward_batch_generation
        batches = 0

        def forward_without_lengths(worker, batch, *args, **kwargs):
            nonlocal batches
            if batch.forward_mode.is_extend():
                return forward(worker, batch, *args, **kwargs)
            batches += 1
            known = batch.seq_lens_cpu, batch.seq_lens_sum
            batch.seq_lens_cpu = batch.seq_lens_sum = None
            output = forward(worker, batch, *args, **kwargs)
            batch.seq_lens_cpu, batch.seq_lens_sum = known  # this scheduler goes on with them
            return output

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EagleWorker, "forward_batch_generation", forward_without_lengths)
            answers = self.ask(requests)
        assert batches, "no batch was verified"
        return answers

    def _run(self, *requests: Request) -> list[Answer]:
        queued = [self._enqueue(str(number), request) for number, request in enumerate(requests)]
        self.running = [request for request, *_ in queued]
        self.scheduler.gracefully_exit = False
        before = self.scheduler.forward_ct
        self.scheduler.event_loop_normal()
        passes = self.scheduler.forward_ct - before
        return [_answer(*request, passes) for request in queued]

    def _stop_when_finished(self) -> None:
        """Stands where SGLang's loop reads its socket: leave the loop when there is no work."""
        self.scheduler.gracefully_exit = all(request.finished() for request in self.running)

    def _enqueue(self, name: str, request: Request) -> tuple[Any, list[int], list[torch.Tensor]]:
        """SGLang's object for the request, its prompt's ids, and its pixels."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        images, pixels = None, []
        ids = request.prompt
        if isinstance(ids, str):
            nothing_else = SimpleNamespace(video_data=None, audio_data=None)
            images = asyncio.run(
                self.images.process_mm_data_async(list(request.pictures), ids, nothing_else)
            )
            ids, pixels = images.input_ids, _pixels(images.mm_items)
        parameters = SamplingParams(
            temperature=0, max_new_tokens=request.new_tokens, ignore_eos=True
        )
        parameters.normalize(None)
        self.scheduler.handle_generate_request(
            TokenizedGenerateReqInput(
                rid=name,
                input_text=None,
                input_ids=array("q", ids),
                input_embeds=None,
                mm_inputs=images,
                token_type_ids=None,
                sampling_params=parameters,
                return_logprob=True,
                logprob_start_len=0 if request.prompt_logprobs else -1,
                top_logprobs_num=0,
                token_ids_logprob=None,
                stream=False,
            )
        )
        return self.scheduler.waiting_queue[-1], list(ids), pixels


def _image_processor(server_args: Any, config: Any) -> Any:
    """SGLang's image processor for this model, made as its tokenizer process makes it."""
    from sglang.srt.managers import multimodal_processor, tokenizer_manager

    multimodal_processor.import_processors("sglang.srt.multimodal.processors")
    return multimodal_processor.get_mm_processor(
        config,
        server_args,
        tokenizer_manager.get_processor_wrapper(),
        tokenizer_manager.determine_tensor_transport_mode(),
    )


def _pixels(items: list[Any]) -> list[torch.Tensor]:
    crops = [item.model_specific_data.get("patch_pixel_values") for item in items]
    crops = [crop for crop in crops if crop is not None]
    views = torch.cat([item.feature for item in items])
    return [views, torch.cat(crops)] if crops else [views]


def _answer(request: Any, prompt: list[int], pixels: list[torch.Tensor], passes: int) -> Answer:
    logprob, tokens = request.logprob, list(request.output_ids_through_stop)
    of_prompt = (logprob.input_token_logprobs_val or [None])[1:]  # the first token has none
    return Answer(
        prompt,
        tokens,
        # Drafts may have been accepted beyond the end.
        [*of_prompt, *logprob.output_token_logprobs_val[: len(tokens)]],
        request.cached_tokens,
        passes,
        request.spec_verify_ct,
        pixels,
    )


def _record_cache(patch: pytest.MonkeyPatch) -> Stored:
    """What each call writes; later there may be something else in its place."""
    from step37_kernels.reference import attention

    write = attention.write_cache
    written: Stored = []

    def write_and_note(k, v, k_cache, v_cache, slots, *scales):
        write(k, v, k_cache, v_cache, slots, *scales)
        keys, values = (cache.view(torch.uint8)[slots.long()] for cache in (k_cache, v_cache))
        written.append((keys, values))

    patch.setattr(attention, "write_cache", write_and_note)
    return written


def _by_layer(written: Stored, layers: int) -> Stored:
    """Join what the forward passes wrote, each of which goes from layer to layer."""
    return [
        (
            torch.cat([k for k, _ in written[n::layers]]),
            torch.cat([v for _, v in written[n::layers]]),
        )
        for n in range(layers)
    ]
