"""Finding the misconfigured node before the job does.

``facts``, ``gpus`` and ``filesystem`` gather what a rank knows about itself; ``network`` and
``filesystem`` try what ranks can only do together; ``judge`` and ``trials`` say what it means, one
line a check.
"""
