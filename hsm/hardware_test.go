package hsm

import "testing"

func TestSoftHSMImports(t *testing.T) {
	_, d := openNew(t)
	if d.imports == nil {
		t.Fatal(d.noImports)
	}
	if p := *d.imports; p.kdf != kdfNull || !p.signers || p.dialect != (dialect{true, true}) {
		t.Fatalf("%+v", p)
	}
}
