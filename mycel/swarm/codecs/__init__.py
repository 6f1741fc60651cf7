"""Update codecs: what a contributor sends of a vector, in how few bytes, and how everyone reads it the same.

Ring: algorithms.
"""

from mycel.swarm.codecs.codec import Codec, Encoder
from mycel.swarm.codecs.layout import Layout
from mycel.swarm.codecs.mixed import MixedCodec
from mycel.swarm.codecs.spec import make_codec

__all__ = ["Codec", "Encoder", "Layout", "MixedCodec", "make_codec"]
