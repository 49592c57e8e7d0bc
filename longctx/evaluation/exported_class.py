"""What lm_eval makes of an exported task: each example may be answered with as many tokens as it has room for.

`harness_tasks.export` copies this file, as longctx_class.py, into the folder that it writes. A task of a YAML file
alone has one max_gen_toks for all of its examples, and what a model writes on after an answer lowers scores such as
MRCR's. Tokens are those of the model that writes, whichever counted the lengths, as where longctx itself asks.
Held by: tests/test_lm_eval.py.
"""

from typing import Any

from lm_eval.api.task import ConfigurableTask

# Names of one setting, the first that is given counts; --gen_kwargs may have any, which then goes for all examples.
MAX_NEW = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')


class Task(ConfigurableTask):
  """A YAML file's task but for max_gen_toks."""

  def __init__(self, config: dict[str, Any]):
    super().__init__(config={name: value for name, value in config.items() if name != 'class'})

  def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Any:
    made = super().construct_requests(doc, ctx, **kwargs)
    settings = made.arguments[1]   # a copy of its own
    if all(settings.get(name) is None for name in MAX_NEW):
      settings['max_gen_toks'] = doc['new_tokens']
    return made
