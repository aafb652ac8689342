"""An extension of griffe: the section `Example` of a docstring is one of examples."""

from griffe import Extension, Object


class Examples(Extension):
    """Google's name of the section is `Examples`; griffe takes another for a note."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Rename the section."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
