"""What a request may hold, and what is answered: https://platform.openai.com/docs/api-reference, completions and chat.

A field that is not here is an error with its name, never ignored.  Beyond OpenAI's: top_k, min_p, repetition_penalty,
ignore_eos, stop_token_ids, cache_salt, as SamplingParams and LLM.add have them, structured_outputs, as vLLM has it, and
use_beam_search with length_penalty and early_stopping, as BeamParams has them.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from llmkernels.engine.beam import BeamParams
from llmkernels.engine.params import MOST_LOGPROBS, SamplingParams
from llmkernels.structured.structure import MOST_CHARACTERS, MOST_CHOICES, Structure

MOST_ANSWERS, MOST_PROMPTS, MOST_STOPS, MOST_BIASES, MOST_TOOLS = 16, 64, 16, 1024, 128
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Words = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Stop = Words | Annotated[list[Words], Field(max_length=MOST_STOPS)]
Name = Annotated[str, StringConstraints(max_length=200)]
Identifier = Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Source = Annotated[str, StringConstraints(min_length=1, max_length=MOST_CHARACTERS)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


# What a beam search depends on; other fields would change nothing, and are refused.
OF_BEAMS = {
    *("model", "prompt", "messages", "n", "best_of", "max_tokens", "max_completion_tokens", "user", "cache_salt"),
    *("use_beam_search", "length_penalty", "early_stopping", "temperature"),
}


class StreamOptions(Strict):
    include_usage: bool = False


class NamedSchema(Strict):
    name: Identifier
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # a schema is always enforced, or refused


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuredOutputs(Strict):
    """One of these: a schema, a regular expression, a grammar in GBNF, a list of strings."""

    json_: dict[str, Any] | Source | None = Field(None, alias="json")
    regex: Source | None = None
    grammar: Source | None = None
    choice: list[Words] | None = Field(None, min_length=1, max_length=MOST_CHOICES)


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
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    structured_outputs: StructuredOutputs | None = None
    use_beam_search: bool = False
    length_penalty: float = Field(1.0, ge=-10, le=10)
    early_stopping: bool | Literal["never"] = False

    def beams(self, params: SamplingParams) -> BeamParams:
        """The beam search that is asked for, params.answers beams wide; ValueError: what it does not depend on."""
        fields = type(self).model_fields
        for name in sorted(self.model_fields_set - OF_BEAMS):
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is given with use_beam_search, which does not depend on it; leave it out")
        if "temperature" in self.model_fields_set and self.temperature:
            raise ValueError(f"temperature is {self.temperature:g} with use_beam_search, which draws nothing; give 0")
        return BeamParams(params.answers, params.max_tokens, self.length_penalty, self.early_stopping)

    def structure(self) -> Structure | None:
        """What the text must be, if anything; ValueError where that is not clear, or cannot be enforced."""
        form, free = self.response_format, self.structured_outputs
        if free and form and form.type != "text":
            raise ValueError("response_format and structured_outputs are both given; give one")
        if free:
            return Structure(json_schema=free.json_, regex=free.regex, ebnf=free.grammar, choice=free.choice)
        if isinstance(form, SchemaFormat):
            return Structure(json_schema={} if form.json_schema.schema_ is None else form.json_schema.schema_)
        return Structure(json_schema={"type": "object"}) if isinstance(form, ObjectFormat) else None

    def params(self, max_tokens: int, logprobs: int | None, structure: Structure | None = None) -> SamplingParams:
        """logprobs: None, or how many alternatives come with each token's own.  structure: instead of its own."""
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
            structure=structure or self.structure(),
        )


class CompletionRequest(Sampling):
    prompt: str | list[Token] | Annotated[list[str] | list[list[Token]], Field(max_length=MOST_PROMPTS)]
    max_tokens: int = Field(16, ge=1, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] = False
    best_of: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """One or many, always as a list."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    name: Identifier
    arguments: str


class ToolCall(Strict):
    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MOST_TOOLS)
    tool_call_id: Name | None = None
    refusal: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates read it: text parts joined, absent fields left out, arguments of calls as objects."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        plain = self.model_dump(exclude_none=True) | {"content": content or ""}
        for call in plain.get("tool_calls", ()):
            try:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            except (ValueError, RecursionError):
                raise ValueError(f"the arguments of the tool call {call['id']!r} are not JSON") from None
        return plain


class Function(Strict):
    name: Identifier
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # false: arguments are any object; else they satisfy `parameters`


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChosenFunction(Strict):
    name: Identifier


class ChosenTool(Strict):
    type: Literal["function"]
    function: ChosenFunction


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[Tool] | None = Field(None, min_length=1, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool = True

    def choice(self) -> str:
        """'none', 'auto', 'required' or the name of a tool; ValueError where it is not among the tools."""
        tools = [tool.function.name for tool in self.tools or ()]
        if len(set(tools)) < len(tools):
            raise ValueError("tools has two of one name; give each its own")
        wish = self.tool_choice or ("auto" if tools else "none")
        chosen: str = wish.function.name if isinstance(wish, ChosenTool) else wish
        if isinstance(wish, ChosenTool) and chosen not in tools:
            raise ValueError(f"tool_choice is {chosen!r}, which is not among tools; give one that is")
        if chosen != "none" and not tools:
            raise ValueError(f"tool_choice is {chosen!r} without tools; give tools")
        if chosen != "none" and (
            self.structured_outputs or (self.response_format and self.response_format.type != "text")
        ):
            raise ValueError("tools and another structure are both given; leave one out, or set tool_choice to 'none'")
        return chosen


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
