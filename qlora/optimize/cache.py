"""What transformers calls the cache of keys and values.

Room: one name.  It became "cache" in transformers 5.18 to 5.24; before, it was "past_key_values".
"""

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
