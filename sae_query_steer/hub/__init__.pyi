from .bundle import Bundle as Bundle
from .bundle import load_bundle as load_bundle
from .bundle import save_bundle as save_bundle
from .hub import Upload as Upload
from .hub import from_pretrained as from_pretrained
from .hub import push_to_hub as push_to_hub
from .query_bias import export_query_bias as export_query_bias
from .registry import registry_entry as registry_entry
