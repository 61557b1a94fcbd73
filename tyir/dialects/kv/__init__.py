"""`kv`: the key/value cache as aliased state of fixed capacity, and attention over it.

`cache` has the cache, and attention that sees all of it; `sparse` what sees some of its blocks;
`stored_rows` what is stored in 8 and in 4 bits.
"""

from __future__ import annotations

from tyir.dialects.kv.cache import *
from tyir.dialects.kv.sparse import *
from tyir.dialects.kv.stored_rows import *
