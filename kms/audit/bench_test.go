package audit

import (
	"context"
	"path/filepath"
	"testing"
)

// memoryDisk keeps nothing: the benchmark then measures the log's own work.
type memoryDisk struct{}

func (memoryDisk) create(string, string, []byte) (file, error) { return memoryDisk{}, nil }
func (memoryDisk) resume(string, string, int64) (file, error)  { return memoryDisk{}, nil }
func (memoryDisk) Write(b []byte) (int, error)                 { return len(b), nil }
func (memoryDisk) Sync() error                                 { return nil }
func (memoryDisk) Close() error                                { return nil }

func benchmarkAppend(b *testing.B, o Options, parallel int) {
	l := mustOpen(b, filepath.Join(b.TempDir(), "log"), o)
	b.SetParallelism(parallel)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			if err := l.Append(context.Background(), entry(i)); err != nil {
				b.Error(err)
			}
		}
	})
}

func BenchmarkAppendNoDisk(b *testing.B)   { benchmarkAppend(b, Options{disk: memoryDisk{}}, 64) }
func BenchmarkAppendDisk1(b *testing.B)    { benchmarkAppend(b, Options{}, 1) }
func BenchmarkAppendDisk64(b *testing.B)   { benchmarkAppend(b, Options{}, 32) }
func BenchmarkAppendDisk1024(b *testing.B) { benchmarkAppend(b, Options{}, 512) }

// The world's governance has four decisions before the rotation.
func BenchmarkBuildEvidence(b *testing.B) {
	w, id, _ := rotated(b)
	for b.Loop() {
		mustBuild(b, w, id)
	}
}

func BenchmarkVerifyEvidence(b *testing.B) {
	w, _, e := rotated(b)
	for b.Loop() {
		if _, err := VerifyEvidence(e, w.State().Cluster()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "log")
	l := mustOpen(b, dir, Options{})
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	disk := osDisk{}
	f, err := disk.create(dir, accessKind.name(0), accessKind.encode(header{}))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	var frames []byte
	for i := range 10_000 {
		frames = appendFrame(frames, entry(i).Marshal())
	}
	if _, err := f.Write(frames); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(frames)))
	for b.Loop() {
		if _, err := ReadLeaves(dir, func(uint64, []byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
