"Benchmarks, and what they say of a reward."
from llava_reward_nb import room

__getattr__, __dir__ = room(__name__, ['geneval', 'benchmarks', 'tables', 'signs', 'runs', 'measures', 'timing', 'report'])
