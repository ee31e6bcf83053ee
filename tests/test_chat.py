"""`llmkernels chat` as a pipe sees it: messages in, answers out, and what is typed with a slash."""

import json

import pytest

from llmkernels.cli import chat


def test_the_talk_is_what_is_sent():
    talk = chat.Talk("Be brief.", params={"temperature": 0.5})
    talk.messages.append({"role": "user", "content": "ls?"})
    body = talk.body("manual")
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert (body["model"], body["temperature"], body["stream"]) == ("manual", 0.5, True)
    assert talk.prompt() == "Be brief.ls?"


def test_commands(tmp_path, capsys):
    talk, file = chat.Talk(), tmp_path / "talk.json"
    assert chat._command(talk, "/system Speak up.") is False
    assert chat._command(talk, "/params temperature=0.7 seed=3") is False
    talk.messages += [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    chat._command(talk, f"/save {file}")
    other = chat.Talk()
    chat._command(other, f"/load {file}")
    assert other == talk
    assert chat._command(talk, "/params seed=none") is False
    assert talk.params == {"temperature": 0.7}
    assert chat._command(talk, "/retry") is True
    assert [message["role"] for message in talk.messages] == ["user"]
    chat._command(talk, "/reset")
    assert (talk.messages, talk.system) == ([], "Speak up.")
    assert chat._command(talk, "/quit") is None
    assert "temperature=0.7, seed=3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/nope", "/nope is no command"),
        ("/params size=3", "'size' is no parameter; there are temperature"),
        ("/params top_k=x", "top_k is 'x'; give a number"),
        ("/save", "give the name of a file"),
        ("/retry", "nothing was said yet"),
    ],
)
def test_a_wrong_command_is_told_and_changes_nothing(line, words):
    talk = chat.Talk()
    with pytest.raises(ValueError, match=words):
        chat._command(talk, line)
    assert talk == chat.Talk()


def test_a_file_that_is_no_talk(tmp_path):
    for content in ("{", "[]", json.dumps({"messages": [{"role": "user"}]})):
        (tmp_path / "x").write_text(content)
        with pytest.raises(ValueError, match="is no talk that /save wrote"):
            chat._command(chat.Talk(), f"/load {tmp_path / 'x'}")


def test_messages_of_several_lines(monkeypatch):
    lines = iter(["one", "", '"""two', 'three"""', "four"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert list(chat._messages(False)) == ["one", "two\nthree", "four"]


def test_errors_in_a_stream_are_told():
    assert chat._text(b"[DONE]", "delta") == ""
    assert chat._text(b'{"choices": [{"delta": {"content": "x"}}]}', "delta") == "x"
    assert chat._text(b'{"choices": [{"text": "x"}]}', "text") == "x"
    with pytest.raises(ValueError, match="stopped"):
        chat._text(b'{"error": {"message": "the engine has stopped"}}', "delta")
