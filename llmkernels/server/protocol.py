"""What a request may hold, and what is answered: https://platform.openai.com/docs/api-reference, completions and chat.

A field that is not here is an error with its name, never ignored.  Beyond OpenAI's: top_k, min_p, repetition_penalty,
ignore_eos, stop_token_ids, cache_salt, as SamplingParams and LLM.add have them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from llmkernels.engine.sampling import MOST_LOGPROBS, SamplingParams

MOST_ANSWERS, MOST_PROMPTS, MOST_STOPS, MOST_BIASES = 16, 64, 16, 1024
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Words = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Stop = Words | Annotated[list[Words], Field(max_length=MOST_STOPS)]
Name = Annotated[str, StringConstraints(max_length=200)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    include_usage: bool = False


class Sampling(Strict):
    """What completions and chat have in common."""

    model: Name | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: list[Token] = Field([], max_length=MOST_STOPS)
    ignore_eos: bool = False
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MOST_BIASES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Name | None = None  # who asks; nothing depends on it
    cache_salt: Name | None = None

    def params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """logprobs: None, or how many alternatives come with each token's own."""
        stop = () if self.stop is None else self.stop
        return SamplingParams(
            n=self.n,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or {},
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs is not None,
            top_logprobs=logprobs or 0,
        )


class CompletionRequest(Sampling):
    prompt: str | list[Token] | Annotated[list[str] | list[list[Token]], Field(max_length=MOST_PROMPTS)]
    max_tokens: int = Field(16, ge=1, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """One or many, always as a list."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Name | None = None
    refusal: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates read it: text parts joined, absent fields left out."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return self.model_dump(exclude_none=True) | {"content": content or ""}


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llmkernels"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    error: ErrorBody
