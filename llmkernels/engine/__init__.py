"""The thin reference engine: a model from a Hugging Face checkpoint, answered by llmkernels ops alone.

    from llmkernels.engine import LLM, SamplingParams
    llm = LLM()  # the shipped checkpoint; or LLM("path/to/checkpoint")
    print(llm.generate("The read() system call", SamplingParams(max_tokens=40))[0].text)

A request travels llm.py -> scheduler.py (which tokens run in this step) -> runner.py (arrays) -> models/model.py (ops)
-> sampling.py (the next tokens), and back (output.py).  cache.py holds the pages' memory, pages.py counts their users,
holdings.py says which a sequence holds, prefix.py finds those whose keys are known.  speculative.py guesses tokens
ahead of the model, lora.py keeps adapters, tables.py the block table from step to step, graphs.py records steps.
llmkernels.models reads checkpoints and adapters, and what the text of an answer must be is for llmkernels.structured
to say.
"""

from llmkernels.engine.beam import Beam as Beam
from llmkernels.engine.beam import BeamParams as BeamParams
from llmkernels.engine.llm import LLM as LLM
from llmkernels.engine.output import Delta as Delta
from llmkernels.engine.output import Output as Output
from llmkernels.engine.output import best as best
from llmkernels.engine.params import SamplingParams as SamplingParams
from llmkernels.engine.speculative import Speculation as Speculation
from llmkernels.models import shipped_model as shipped_model
from llmkernels.models.files import CheckpointError as CheckpointError
from llmkernels.structured import Structure as Structure
