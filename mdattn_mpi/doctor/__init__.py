"""Finding the misconfigured node before the job does.

``facts``, ``gpus`` and ``filesystem`` gather what a rank knows about itself; ``network`` and
``filesystem`` try what ranks can only do together; ``judge`` turns all of it into one line a check.
"""
