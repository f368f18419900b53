"""Reading a page as a browser would."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The text that a browser would show of a page, its tags, and its titles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.titles, self.tags = "", [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text += data
