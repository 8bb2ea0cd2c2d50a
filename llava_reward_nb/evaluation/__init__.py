"Benchmarks, and what they say of a reward."
from llava_reward_nb import room

__getattr__, __dir__ = room(__name__, ['geneval', 'records', 'twins', 'benchmarks', 'signs', 'tables', 'runs', 'measures', 'timing',
                                       'report'])
