package audit

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"
)

// TestEntryVector fixes the leaf of an entry: its bytes are what checkpoints of
// access logs commit to.
func TestEntryVector(t *testing.T) {
	const want = "aa646e6f64656966722d6e6f64652d316474696d651b0000019b76daa80765636f756e740166616374696f6e67656e63" +
		"7279707467636f6e74657874a2657461626c65666f72646572736674656e616e7465616c706861676f7574636f6d6562" +
		"6f6b67726571756573746c7265712d30303030303030376776657273696f6e03687265736f7572636570636f616c6974" +
		"696f6e2f6f7264657273697072696e636970616c78237370696666653a2f2f66722e6578616d706c652f736572766963" +
		"652f706c616e6e6572"
	if got := hex.EncodeToString(entry(7).Marshal()); got != want {
		t.Errorf("leaf %s", got)
	}
	const hash = "a38a0ce8f844e8ab8ad6ad9ac4ac017653e6e0e7ef91d0a3a9afe5fe5efe7a68" // SHA-256(00 ‖ leaf), RFC 6962 section 2.1
	if got := hex.EncodeToString(LeafHash(entry(7).Marshal())); got != hash {
		t.Errorf("leaf hash %s", got)
	}
}

func FuzzParseEntry(f *testing.F) {
	f.Add(entry(1).Marshal())
	f.Add(Entry{}.Marshal())
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseEntry(b)
		if err == nil && !bytes.Equal(e.Marshal(), b) {
			t.Error("accepted bytes that it does not write")
		}
	})
}

// fuzzSegment checks what a reader of segments owes to any file: it ends, and
// what it read is the beginning of the file, byte for byte.
func fuzzSegment(f *testing.F, k kind, payloads ...[]byte) {
	good := k.encode(header{})
	for _, p := range payloads {
		good = appendFrame(good, p, headerSize)
	}
	f.Add(good)
	f.Add(good[:len(good)-3])
	f.Add(append(bytes.Clone(good), make([]byte, 100)...))
	f.Add(good[:headerSize])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		again := bytes.Clone(b[:min(len(b), headerSize)])
		h, end, err := k.scan("file", bytes.NewReader(b), int64(len(b)), func(p []byte) error {
			if k == clusterKind {
				if _, _, err := decodeCluster(p); err != nil {
					return &damage{why: err.Error()}
				}
			}
			// Where its batch began, the record itself says.
			end := len(again) + frameSize + len(p)
			batch, _ := tailBatch(b[end-frameTail : end])
			again = appendFrame(again, p, end-int(batch))
			return nil
		})
		var d *damage
		if err != nil && (!errors.As(err, &d) || d.path != "file") {
			t.Fatalf("an error that does not say where: %v", err)
		}
		if end == 0 {
			return // no header
		}
		if !bytes.Equal(append(k.encode(h), again[headerSize:]...), b[:end]) {
			t.Error("what was read is not what is written")
		}
		if (err == nil) != (end == int64(len(b))) {
			t.Errorf("%v after %d of %d bytes", err, end, len(b))
		}
	})
}

func FuzzAccessSegment(f *testing.F) {
	fuzzSegment(f, accessKind, entry(1).Marshal(), entry(2).Marshal())
}

func FuzzClusterSegment(f *testing.F) {
	fuzzSegment(f, clusterKind,
		append([]byte{recordCommand, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 3}, "rawleaf"...),
		append([]byte{recordGap}, make([]byte, 24)...))
}

func FuzzParseEvidence(f *testing.F) {
	f.Add(Evidence{Format: EvidenceFormat}.Marshal())
	f.Add(Evidence{Format: EvidenceFormat, Cluster: "00", Governance: []Decision{{Proposal: []byte{1}}}, Receipts: [][]byte{{2}}}.Marshal())
	f.Add([]byte("{}"))
	w, _, e := rotated(f)
	f.Add(e.Marshal())
	cluster := w.State().Cluster()
	good := e.Marshal()
	hard := vault(f)
	hard.Rekey(de1)
	f.Add(mustBuild(f, hard, rotate(hard, sealTarget)).Marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseEvidence(b)
		if err != nil {
			return
		}
		if !bytes.Equal(e.Marshal(), b) {
			t.Error("accepted bytes that it does not write")
		}
		if _, err := VerifyEvidence(e, cluster); err == nil && !bytes.Equal(b, good) {
			t.Error("accepted evidence that nobody made")
		}
	})
}
