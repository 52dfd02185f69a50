"""General nouns: what people look for in images, most of which any one index does not show."""

from .query import TEMPLATES

WORDS = """
aeroplane apple baby bag ball banana bathroom beach bear bed bee bicycle bird blanket boat book bottle bowl box boy
bread bridge bus butterfly cake camera candle car castle cat cave chair chicken child church city clock cloud coat
coffee computer cow crowd cup curtain dance desert desk diagram dog door drawing dress duck elephant engine envelope
factory farm fence field fire fish flag flower forest fork fountain fox frog fruit garden gate girl glass glove goat
grass guitar hair hammer hand harbour hat helicopter hill horse hospital hotel house insect island jacket juice key
keyboard kitchen knife ladder lake lamp leaf letter library lion lizard map market meal microscope milk mirror money
monkey moon motorcycle mountain mushroom newspaper night ocean office orange painting palm park party pencil penguin
phone piano picture pig pillow pizza plate poster potato rabbit radio rain restaurant river road robot rock roof
room rope rose ruler sand sandwich school scissors screen sculpture sheep shell ship shirt shoe sign snake snow sofa
soldier soup spider spoon stadium stage staircase star station statue stone street suit suitcase sun sunset swimming
table tank tea teacher telescope tent text theatre tiger tomato tool tower toy tractor train tree truck umbrella
vegetable village violin wall watch water waterfall wedding wheel window wine wolf woman wood worker zebra
"""

REFERENCE_TEXTS = tuple(TEMPLATES[0].format(noun) for noun in WORDS.split())
"""Reference queries of texts, see `result_cutoff`; and queries by which an approximate scan is measured."""

__all__ = ["REFERENCE_TEXTS"]
