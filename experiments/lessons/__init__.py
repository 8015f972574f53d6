"""Tasks that the embedded models lack, and the short fine-tunes that teach them."""
