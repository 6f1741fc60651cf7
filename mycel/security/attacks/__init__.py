"""What liars send in a round, so that every robust rule is tested against it. Nothing in here defends.

`attack(name)` is for simulations, where liars know all honest rows and the rule itself (`together`); `play(name)` is
for one liar alone, that knows its own rows and those of earlier rounds (`alone`), as the liars of demos do.

Ring: algorithms.
"""

from mycel.security.attacks.alone import LONERS, Play, play
from mycel.security.attacks.scene import Attack, Scene
from mycel.security.attacks.together import ATTACKS, DATA_ATTACKS, attack, flip_labels

__all__ = ["ATTACKS", "DATA_ATTACKS", "LONERS", "Attack", "Play", "Scene", "attack", "flip_labels", "play"]
