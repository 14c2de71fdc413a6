package child

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/conclave-kms/conclave/hsm"
)

func frameOf(m message) []byte { return m.append(nil) }

// seeds are frames of all kinds.
func seeds() [][]byte {
	open := request(opOpen, protocol, []byte("pkcs11:token=x"), []byte("1234"), []byte("conclave"), nil, limits{1, 8, 256}.bytes())
	open.arg = curveP384
	failed := errorReply(unavailablef("gone"))
	failed.id = 3
	use := request(opUse, 7, make([]byte, 100))
	use.id = 1 << 40
	return [][]byte{frameOf(open), frameOf(failed), frameOf(use), frameOf(request(opCheck, 0)), frameOf(request(opWrap, 0, nil, []byte("k"))),
		frameOf(request(opGenerateHMAC, 1, joinList([][]byte{[]byte("a"), nil, []byte("b")})))}
}

func TestFrame(t *testing.T) {
	for i, f := range seeds() {
		m, err := parse(f)
		if err != nil {
			t.Fatalf("%d: %v", i, err)
		}
		if again := m.append(nil); !bytes.Equal(again, f) || m.size() != len(f) {
			t.Errorf("%d: %x, again %x", i, f, again)
		}
		for n := range f {
			if _, err := parse(f[:n]); err == nil {
				t.Errorf("%d: taken with %d of %d bytes", i, n, len(f))
			}
		}
		if _, err := parse(append(bytes.Clone(f), 0)); err == nil {
			t.Errorf("%d: taken with a byte more", i)
		}
	}
	good := frameOf(request(opSign, 0, []byte("digest")))
	for name, f := range map[string]func(b []byte){
		"unknown op":     func(b []byte) { b[4] = byte(opEnd) },
		"too many parts": func(b []byte) { b[6] = maxParts + 1 },
		"fewer parts":    func(b []byte) { b[6] = 0 },
		"more parts":     func(b []byte) { b[6] = 2 },
		"long part":      func(b []byte) { b[headerSize] = 0xff },
		"reserved byte":  func(b []byte) { b[7] = 1 },
		"short length":   func(b []byte) { b[3] = 3 },
		"long length":    func(b []byte) { b[0] = 1 },
	} {
		b := bytes.Clone(good)
		f(b)
		if _, err := parse(b); !errors.Is(err, errFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestList(t *testing.T) {
	for _, list := range [][][]byte{nil, {{}}, {[]byte("a"), {}, []byte("bc")}} {
		got, err := splitList(joinList(list))
		if err != nil || len(got) != len(list) {
			t.Fatalf("%v: %v, %v", list, got, err)
		}
		for i := range list {
			if !bytes.Equal(got[i], list[i]) {
				t.Errorf("%v: %v", list, got)
			}
		}
	}
	if _, err := splitList(joinList(make([][]byte, maxList+1))); err == nil {
		t.Error("a list of too many was taken")
	}
}

// TestReader cuts a stream that comes in pieces of all sizes.
func TestReader(t *testing.T) {
	var stream []byte
	for _, f := range seeds() {
		stream = append(stream, f...)
	}
	for name, src := range map[string]io.Reader{"at once": bytes.NewReader(stream), "a byte at a time": iotest.OneByteReader(bytes.NewReader(stream)),
		"halves": iotest.HalfReader(bytes.NewReader(stream)), "with the end": iotest.DataErrReader(bytes.NewReader(stream))} {
		r, err := newReader(src)
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range seeds() {
			got, err := r.next()
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s: frame %d: %x, %v", name, i, got, err)
			}
		}
		if _, err := r.next(); err != io.EOF {
			t.Errorf("%s: at the end: %v", name, err)
		}
		if b := r.buf.Reveal(); !bytes.Equal(b, make([]byte, len(b))) {
			t.Errorf("%s: frames are left in memory", name)
		}
		r.end()
	}
	r, err := newReader(bytes.NewReader(stream[:len(stream)-1]))
	if err != nil {
		t.Fatal(err)
	}
	defer r.end()
	for err == nil {
		_, err = r.next()
	}
	if err != io.ErrUnexpectedEOF {
		t.Errorf("within a frame: %v", err)
	}
}

func TestErrorsCross(t *testing.T) {
	for _, want := range kinds[1:] {
		m, err := parse(frameOf(errorReply(want)))
		if err != nil {
			t.Fatal(err)
		}
		if got := replyError(m); !errors.Is(got, want) || got.Error() != want.Error() {
			t.Errorf("%v became %v", want, got)
		}
		for _, other := range kinds[1:] {
			if other != want && errors.Is(replyError(m), other) {
				t.Errorf("%v became %v", want, other)
			}
		}
	}
	late := contextError("sign", context.DeadlineExceeded)
	if got := replyError(errorReply(late)); !errors.Is(got, hsm.ErrUnavailable) {
		t.Errorf("%v became %v", late, got)
	}
	if got := replyError(errorReply(errors.New("a\x1b[31m\nb"))); got.Error() != "a?[31m?b" || !errors.Is(got, hsm.ErrUnavailable) {
		t.Errorf("%q", got)
	}
	if got := replyError(message{op: opReply, arg: byte(len(kinds)), n: 1}); got != errFrame {
		t.Errorf("an unknown kind: %v", got)
	}
}

// FuzzFrame holds that no bytes panic the decoders and that what they take is what
// the encoders write.
func FuzzFrame(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parse(b)
		if err != nil {
			return
		}
		if again := m.append(nil); !bytes.Equal(again, b) {
			t.Errorf("%x, again %x", b, again)
		}
		_ = replyError(m)
		_, _ = parseIdentity(m)
		_, _ = parseLimits(m.parts[0])
		_, _ = decodeAttributes(m.parts[0])
		if cfg, err := parseOpening(m); err == nil {
			cfg.PIN.Destroy()
		}
		if list, err := splitList(m.parts[0]); err == nil && !bytes.Equal(joinList(list), m.parts[0]) {
			t.Errorf("list %x", m.parts[0])
		}
	})
}
