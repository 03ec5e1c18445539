"""Commands behind `selfteach forecast`: measure the untrained model and say which arms can teach it.

`collection` samples and scores, `teacher_samples` samples the teacher's answers, `step_cost` measures
seconds, `measures` turns arrays into estimates, `verdict` holds the rule, `run_forecast` runs it all.
"""
