package pqc

import "testing"

func BenchmarkOpen(b *testing.B) {
	for _, id := range kemSuites {
		b.Run(id.String(), func(b *testing.B) {
			k, _ := newDeviceKey(b, id)
			sealed := must[[]byte](b)(k.PublicKey().Seal(nil, nil, make([]byte, 32)))
			for b.Loop() {
				if _, err := k.Open(nil, nil, sealed); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkSeal(b *testing.B) {
	for _, id := range kemSuites {
		b.Run(id.String(), func(b *testing.B) {
			k, _ := newDeviceKey(b, id)
			for b.Loop() {
				if _, err := k.PublicKey().Seal(nil, nil, make([]byte, 32)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkWithExchanger(b *testing.B) {
	k, d := newDeviceKey(b, MLKEM1024P384)
	for b.Loop() {
		k.WithExchanger(d)
	}
}

func BenchmarkVerify(b *testing.B) {
	for _, id := range signatureSuites {
		b.Run(id.String(), func(b *testing.B) {
			pub, sign := newSigner(b, id)
			sig := sign([]byte("message"), nil)
			for b.Loop() {
				if err := Verify(id, pub, []byte("message"), nil, sig); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkHybridSign(b *testing.B) {
	k := must[*HybridKey](b)(GenerateHybrid(nil))
	for b.Loop() {
		if _, err := k.Sign([]byte("message"), nil); err != nil {
			b.Fatal(err)
		}
	}
}
