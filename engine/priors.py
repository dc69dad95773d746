"""Priors over live diffusers pipelines: Stable Diffusion, SDXL, class-conditional DiT."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from synthkd.engine.decoders import Decoder, VaeDecoder, evaluating, latent_layout, unmarked
from synthkd.engine.embeddings import guidance_embedding
from synthkd.engine.errors import SynthkdError
from synthkd.engine.families import PARTS, XL, check_class, check_parts, check_scheduler, label_numbers
from synthkd.engine.latent_model import Conditioning, LatentModel
from synthkd.engine.precision import copied, decode_dtype, finite_decoder
from synthkd.engine.roles import RoleCall
from synthkd.engine.settings import settings_of

_PROMPT_CACHE = 4096
_AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")


class _PipelinePrior:
    """What priors over a live pipeline share; the pipeline is left as it was."""

    denoiser_part = "unet"

    def __init__(self, pipe: Any) -> None:
        """pipe: a live pipeline; refused with SynthkdError where its class or its parts do not fit."""
        _check_live(pipe)
        self._pipe = pipe
        self._routes: Mapping[str, Callable[..., Any]] = {}
        self._denoiser: Any = getattr(pipe, self.denoiser_part)
        self._decoder = self._make_decoder()
        self._channels, self._factor = latent_layout(pipe.vae)
        taken = self._denoiser.config.in_channels
        if taken != self._channels:
            raise SynthkdError(
                f"model: vae has {self._channels} latent channels, {self.denoiser_part} {taken}; expected the same"
            )

    def _make_decoder(self) -> VaeDecoder:
        """Over the live autoencoder, or over a copy in a wider dtype where float16 would not hold it (said once)."""
        return finite_decoder(self._pipe.vae, self._decoder_over)

    def _decoder_over(self, vae: Any) -> VaeDecoder:
        return VaeDecoder(vae, vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0)

    @property
    def decoder(self) -> Decoder:
        """The pipeline's VAE."""
        return self._decoder

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The pipeline's scheduler config."""
        return dict(self._pipe.scheduler.config)

    @property
    def device(self) -> torch.device:
        """The denoiser's device."""
        return next(self._denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's dtype."""
        return next(self._denoiser.parameters()).dtype

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Raises SynthkdError where the size is not a multiple of the VAE's factor."""
        for name, value in (("height", height), ("width", width)):
            if value % self._factor:
                raise SynthkdError(f"recipe: {name} is {value}; this model needs a multiple of {self._factor}")
        return self._channels, height // self._factor, width // self._factor

    def denoise(
        self, z: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning | None
    ) -> tuple[Tensor, Tensor | None]:
        """One denoiser call; with classifier-free guidance on a doubled batch, unconditional half first."""
        evaluate = self._routes.get("unet", self._evaluate)
        with evaluating(self._denoiser):
            if uncond is None:
                return evaluate(z, t, cond), None
            told = {name: torch.cat([uncond[name], value]) for name, value in cond.items()}
            out_uncond, out_cond = evaluate(torch.cat([z, z]), t, told).chunk(2)
        return out_cond, out_uncond

    def text_calls(self) -> Sequence[RoleCall]:
        """See `roles.RoutedModel`."""
        return ()

    def denoiser_call(self, cond: Conditioning, z: Tensor, t: Tensor) -> RoleCall:
        """See `roles.RoutedModel`."""
        settings, inputs = settings_of(self._denoiser), (z, t, cond)
        return RoleCall(
            name="unet", function=self._evaluate, modules=(self._denoiser,), inputs=inputs, batched=(True, False, True),
            identity=settings,
        )  # fmt: skip

    @contextmanager
    def routed(self, routes: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        """See `roles.RoutedModel`."""
        before, self._routes = self._routes, routes
        try:
            yield
        finally:
            self._routes = before

    @contextmanager
    def replaced(self, denoiser: nn.Module) -> Iterator[None]:
        """See `roles.ReplaceableModel`."""
        before, self._denoiser = self._denoiser, denoiser
        try:
            yield
        finally:
            self._denoiser = before

    def _evaluate(self, z: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        raise NotImplementedError

    def modules(self) -> Iterable[nn.Module]:
        """The denoiser, the autoencoder that decodes, and the text encoders."""
        encoders = [getattr(self._pipe, p) for p in PARTS[type(self._pipe).__name__] if p.startswith("text_encoder")]
        return (self._denoiser, self._decoder.module, *encoders)

    def settings(self) -> dict[str, Any]:
        """Configs and vocabularies of the parts, and the decoder's scaling."""
        parts = [part for part in PARTS[type(self._pipe).__name__] if part not in ("scheduler", "vae")]
        return {**{p: settings_of(getattr(self._pipe, p)) for p in parts}, "decoder": self._decoder.settings}


class StableDiffusion(_PipelinePrior):
    """StableDiffusionPipeline (1.x, 2.x) and LatentConsistencyModelPipeline: one text encoder, a UNet."""

    def __init__(self, pipe: Any) -> None:
        """See the base class."""
        super().__init__(pipe)
        self._cache: OrderedDict[tuple[str, str], Conditioning] = OrderedDict()
        if getattr(self._denoiser, "encoder_hid_proj", None) is not None:
            raise SynthkdError(
                "model: the unet has an IP-Adapter, which is not supported yet; call unload_ip_adapter()"
            )

    def check_prompts(self, prompts: Iterable[str], negative_prompt: str) -> None:
        """Any text will do."""

    def conditions(
        self, prompts: Sequence[str], negative_prompt: str, guidance_scale: float, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        """Text encoder states [B,L,D]; each prompt is encoded alone, once, so the batch cannot change a bit.

        With guidance embedded in the UNet (arXiv 2210.03142) `timestep_cond` [B,E] holds its scale, and the
        negative prompt is not used.
        """
        rows = [self._encoded(p) for p in prompts]
        shared = self._shared(len(rows), guidance_scale, size)
        cond = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        if guidance_scale <= 1.0 or "timestep_cond" in shared:
            return cond | shared, None
        negative = self._negative(negative_prompt)
        return cond | shared, {name: negative[name].expand_as(value) for name, value in cond.items()} | shared

    def _shared(self, count: int, guidance_scale: float, size: tuple[int, int]) -> Conditioning:
        """Conditions that are the same for every prompt and its negative."""
        width = self._denoiser.config.time_cond_proj_dim
        if width is None:
            return {}
        embedding = guidance_embedding(guidance_scale, width).to(self.device, self.dtype)
        return {"timestep_cond": embedding.repeat(count, 1)}

    def _encoded(self, prompt: str) -> Conditioning:
        """Conditions of one prompt, tensors [1,...]."""
        route = self._routes.get("text_encoder")  # another backend's states are other ones in their last bits
        key = prompt, "" if route is None else getattr(getattr(route, "manifest", None), "key", "compiled")
        if key not in self._cache:
            told = {name: x.to(self.device, self.dtype) for name, x in self._encode(prompt).items()}
            self._cache[key] = told
            if len(self._cache) > _PROMPT_CACHE:
                self._cache.popitem(last=False)
            return told
        return self._cache[key]

    def _negative(self, prompt: str) -> Conditioning:
        return self._encoded(prompt)

    def text_calls(self) -> Sequence[RoleCall]:
        """See `roles.RoutedModel`."""
        encoder = self._pipe.text_encoder
        return (_text_call("text_encoder", encoder, self._states, self._told(self._pipe.tokenizer, encoder, "")),)

    def _encode(self, prompt: str) -> Conditioning:
        tokenizer, encoder = self._pipe.tokenizer, self._pipe.text_encoder
        states = self._routes.get("text_encoder", self._states)
        return {"encoder_hidden_states": states(*self._told(tokenizer, encoder, prompt))}

    def _told(self, tokenizer: Any, encoder: Any, prompt: str) -> tuple[Tensor, Tensor | None]:
        """Token ids [1,L] and, where the encoder wants one, their mask, where it computes."""
        tokens, at = self._tokens(tokenizer, prompt), next(encoder.parameters()).device
        masked = getattr(encoder.config, "use_attention_mask", 0)
        return tokens.input_ids.to(at), tokens.attention_mask.to(at) if masked else None

    def _states(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Text encoder states [1,L,D]."""
        encoder = self._pipe.text_encoder
        with torch.no_grad(), evaluating(encoder), unmarked(encoder):
            states: Tensor = encoder(ids, attention_mask=mask)[0]
        return states

    def _tokens(self, tokenizer: Any, prompt: str) -> Any:
        """Token ids and mask [1,L]; a textual inversion's name stands for all of its vectors."""
        return tokenizer(
            self._pipe.maybe_convert_prompt(prompt, tokenizer),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )

    def _evaluate(self, z: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        out: Tensor = self._denoiser(z, t, **told, return_dict=False)[0]
        return out


class StableDiffusionXL(StableDiffusion):
    """StableDiffusionXLPipeline, the base (arXiv 2307.01952): two text encoders, pooled text and size as conditions."""

    def _make_decoder(self) -> VaeDecoder:
        """In half precision with `force_upcast`, over a float32 copy: the live autoencoder is not touched."""
        vae = self._pipe.vae
        wanted = decode_dtype(self._pipe, vae.dtype)
        return super()._make_decoder() if wanted == vae.dtype else self._decoder_over(copied(vae, wanted))

    def _decoder_over(self, vae: Any) -> VaeDecoder:
        mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        moments = None if mean is None or std is None else (mean, std)
        return VaeDecoder(vae, vae.config.scaling_factor, moments=moments)

    def _shared(self, count: int, guidance_scale: float, size: tuple[int, int]) -> Conditioning:
        """time_ids [B,6]: original size, crop corner, target size, as for an image that was not cropped."""
        ids = torch.tensor([[*size, 0, 0, *size]], device=self.device, dtype=self.dtype)
        return super()._shared(count, guidance_scale, size) | {"time_ids": ids.repeat(count, 1)}

    def settings(self) -> dict[str, Any]:
        """See the base class; and what an empty negative prompt is."""
        return super().settings() | {"zeros": bool(self._pipe.config.force_zeros_for_empty_prompt)}

    def _negative(self, prompt: str) -> Conditioning:
        told = self._encoded(prompt)
        if prompt == "" and self._pipe.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(x) for name, x in told.items()}
        return told

    def _encode(self, prompt: str) -> Conditioning:
        """Penultimate states of both encoders side by side [1,L,D1+D2], and the second's pooled embedding [1,P]."""
        states, pooled = [], None
        for suffix in ("", "_2"):
            run = self._routes.get(f"text_encoder{suffix}", partial(self._both, suffix))
            state, pooled = run(self._ids(suffix, prompt))
            states.append(state.to(self.device))
        if pooled is None or pooled.ndim != 2:
            raise SynthkdError(
                "model: text_encoder_2 gives no pooled embedding; expected a CLIPTextModelWithProjection"
            )
        return {"encoder_hidden_states": torch.cat(states, dim=-1), "text_embeds": pooled}

    def text_calls(self) -> Sequence[RoleCall]:
        """See `roles.RoutedModel`."""
        return tuple(
            _text_call(
                f"text_encoder{suffix}", getattr(self._pipe, f"text_encoder{suffix}"), partial(self._both, suffix),
                (self._ids(suffix, ""),),
            )
            for suffix in ("", "_2")
        )

    def _ids(self, suffix: str, prompt: str) -> Tensor:
        """Token ids [1,L] of one of the encoders, where it computes."""
        ids: Tensor = self._tokens(getattr(self._pipe, f"tokenizer{suffix}"), prompt).input_ids
        return ids.to(next(getattr(self._pipe, f"text_encoder{suffix}").parameters()).device)

    def _both(self, suffix: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Penultimate states [1,L,D] of one of the encoders, and its first output."""
        encoder = getattr(self._pipe, f"text_encoder{suffix}")
        with torch.no_grad(), evaluating(encoder), unmarked(encoder):
            out = encoder(ids, output_hidden_states=True)
        return out.hidden_states[-2], out[0]

    def _evaluate(self, z: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        added = {name: told[name] for name in ("text_embeds", "time_ids")}
        rest = {name: x for name, x in told.items() if name not in added}
        out: Tensor = self._denoiser(z, t, **rest, added_cond_kwargs=added, return_dict=False)[0]
        return out


class ClassConditional(_PipelinePrior):
    """DiTPipeline (arXiv 2212.09748): no text; a "prompt" is a label or a number of the model's classes."""

    denoiser_part = "transformer"

    def __init__(self, pipe: Any) -> None:
        """See the base class."""
        super().__init__(pipe)
        self._numbers = label_numbers(pipe)
        self._classes = int(self._denoiser.config.num_embeds_ada_norm)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Raises SynthkdError where the size is not the one the model was trained for."""
        side = int(self._denoiser.config.sample_size)
        for name, value in (("height", height), ("width", width)):
            if value != side * self._factor:
                raise SynthkdError(f"recipe: {name} is {value}; this model draws {side * self._factor} only")
        return self._channels, side, side

    def check_prompts(self, prompts: Iterable[str], negative_prompt: str) -> None:
        """Raises SynthkdError for a prompt that names no class of the model, or any negative prompt."""
        for prompt in prompts:
            self._number(prompt)
        if negative_prompt:
            raise SynthkdError(f"recipe: negative_prompt is {negative_prompt!r}; a class-conditional model takes none")

    def conditions(
        self, prompts: Sequence[str], negative_prompt: str, guidance_scale: float, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        """Class numbers int64 [B]; the negative is the null class, the one after the last."""
        self.check_prompts((), negative_prompt)
        numbers = torch.tensor([self._number(p) for p in prompts], device=self.device)
        if guidance_scale <= 1.0:
            return {"class_labels": numbers}, None
        return {"class_labels": numbers}, {"class_labels": torch.full_like(numbers, self._classes)}

    def settings(self) -> dict[str, Any]:
        """See the base class; and which label is which class."""
        return super().settings() | {"labels": {label: sorted(found) for label, found in self._numbers.items()}}

    def _number(self, prompt: str) -> int:
        found = self._numbers.get(prompt) or self._numbers.get(prompt.strip().lower(), frozenset())
        if len(found) == 1:
            return next(iter(found))
        if found:
            raise SynthkdError(f"recipe: {prompt!r} is the label of classes {sorted(found)}; name the number you mean")
        if re.fullmatch(r"\s*[0-9]+\s*", prompt) and int(prompt) < self._classes:
            return int(prompt)
        near = [repr(label) for label in get_close_matches(prompt.lower(), self._numbers, n=3, cutoff=0.0)]
        nearest = f"nearest: {', '.join(near)}; " if near else ""
        raise SynthkdError(
            f'recipe: prompt {prompt!r} is no class of this model; {nearest}set prompts = ["{{class}}"] and name each '
            f"class by its label in the model or by its number, 0 to {self._classes - 1}"
        )

    def _evaluate(self, z: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        """The first C channels of the output; a learned sigma, if any, follows them and is not used."""
        out: Tensor = self._denoiser(z, timestep=t.expand(z.shape[0]), **told, return_dict=False)[0]
        return out[:, : z.shape[1]]


_FAMILIES: Mapping[str, Callable[[Any], LatentModel]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "LatentConsistencyModelPipeline": StableDiffusion,
    XL: StableDiffusionXL,
    "DiTPipeline": ClassConditional,
}


def wrap_pipeline(pipe: Any) -> LatentModel:
    """A live diffusers pipeline as a prior, where it is, in its own dtype; it is left as it was.

    Raises SynthkdError for a class that is not supported, a missing part or a schedule of another kind.
    """
    check_class("model", type(pipe).__name__)
    return _FAMILIES[type(pipe).__name__](pipe)


def _text_call(name: str, encoder: Any, function: Callable[..., Any], inputs: tuple[Any, ...]) -> RoleCall:
    """A text encoder on one prompt: its length is fixed, and a batch of one cannot change a bit."""
    fixed, settings = (False,) * len(inputs), settings_of(encoder)
    return RoleCall(  # traced: transformers takes a lock where hidden states are asked for
        name=name, function=function, modules=(encoder,), inputs=inputs, batched=fixed, dynamic=False, traced=True,
        identity=settings,
    )  # fmt: skip


def _check_live(pipe: Any) -> None:
    name = type(pipe).__name__
    check_class("model", name)
    check_parts("model", name, {part: getattr(pipe, part, None) is not None for part in PARTS[name]})
    check_scheduler("model", type(pipe.scheduler).__name__, pipe.scheduler.config)
    vae = type(getattr(pipe.vae, "_orig_mod", pipe.vae)).__name__
    if vae not in _AUTOENCODERS:
        raise SynthkdError(f"model: vae is a {vae}; expected {' or '.join(_AUTOENCODERS)}")
    for part in PARTS[name]:
        if hasattr(getattr(pipe, part), "_hf_hook"):
            raise SynthkdError(
                f"model: {part} is offloaded; call remove_all_hooks() and move the pipeline to one device"
            )
