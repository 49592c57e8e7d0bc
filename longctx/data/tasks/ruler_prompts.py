"""The words of RULER's prompts, which define the benchmark: (before each context, after it).

Source: github.com/NVIDIA/RULER at c3f5e3b, scripts/data/synthetic/constants.py and niah.py
(Apache-2.0, (c) NVIDIA): template and answer prefix, in one. Budgets of new tokens and the scores
that its authors gave for single tasks (its issues 63 and 71) are theirs too.
"""

from collections.abc import Mapping

NEEDLE = 'One of the special magic {kind} for {key} is: {value}.'
NIAH = ('Some special magic {kind} are hidden within the following text. Make sure to memorize it. '
        'I will quiz you about the {kind} afterwards.\n',
        '\nWhat are all the special magic {kind} for {query} mentioned in the provided text? '
        'The special magic {kind} for {query} mentioned in the provided text are')
VT = ('Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n',
      '\nQuestion: Find all variables that are assigned the value {query} in the text above. '
      'Answer: According to the chain(s) of variable assignment in the text above, {number} '
      'variables are assigned the value {query}, they are: ')
CWE = ('Below is a numbered list of words. In these words, some appear more often than others. '
       'Memorize the ones that appear most often.\n',
       '\nQuestion: What are the 10 most common words in the above list? '
       'Answer: The top 10 words that appear most often in the list are:')
FWE = ('Read the following coded text and track the frequency of each coded word. '
       'Find the three most frequently appeared coded words. ',
       "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
       'What are the three most frequently appeared words in the above coded text? '
       'Answer: According to the coded text above, the three most frequently appeared words are:')
QA = ('Answer the question based on the given documents. '
      'Only give me the answer and do not output any other words.\n\n'
      'The following are given documents.\n\n',
      '\n\nAnswer the question based on the given documents. '
      'Only give me the answer and do not output any other words.\n\n'
      'Question: {query} Answer:')
DOCUMENT = 'Document {i}:\n{document}'

NEW_TOKENS = {'niah': 128, 'vt': 30, 'cwe': 120, 'fwe': 50, 'qa': 32}

_COLUMNS = ('niah_single_1', 'niah_single_2', 'niah_single_3', 'niah_multikey_1',
            'niah_multikey_2', 'niah_multikey_3', 'niah_multivalue', 'niah_multiquery',
            'vt', 'fwe', 'cwe', 'qa_1', 'qa_2')
_SCORES = {
    'GPT-4-1106-preview at 4096': (
        100, 100, 100, 100, 100, 100, 99.5, 100, 100, 98, 100, 88, 70),
    'Phi-3-mini-128k at 4096': (
        100, 100, 100, 96.6, 99.6, 99.6, 92.2, 98.5, 97.1, 85.1, 91.9, 83.8, 54.2),
    'Phi-3-mini-128k at 8192': (
        100, 100, 100, 96.6, 100, 99.4, 95.2, 98.5, 99.3, 83.4, 88.6, 75.8, 53),
    'Phi-3-mini-128k at 16384': (
        100, 100, 100, 95.4, 100, 98.6, 92.8, 98, 99.3, 86.7, 78.7, 78.8, 50.2),
}


def published(task: str) -> Mapping[str, float]:
  """'model at length' -> score in percent of one of the thirteen, on the published form."""
  return {model: float(scores[_COLUMNS.index(task)]) for model, scores in _SCORES.items()}


def one(prompt: tuple[str, str]) -> tuple[str, str]:
  """The needles' prompt where one answer is asked for; the kind is to be singular too."""
  head, question = (part.replace('Some', 'A').replace('are all', 'is').replace('are', 'is')
                    for part in prompt)
  return head, question
