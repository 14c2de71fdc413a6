package audit

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// memoryDisk keeps nothing: the benchmark then measures the log's own work.
type memoryDisk struct{}

func (memoryDisk) create(string, string, []byte) (file, error) { return memoryDisk{}, nil }
func (memoryDisk) resume(string, string, int64) (file, error)  { return memoryDisk{}, nil }
func (memoryDisk) WriteAt(b []byte, _ int64) (int, error)      { return len(b), nil }
func (memoryDisk) Truncate(int64) error                        { return nil }
func (memoryDisk) Sync() error                                 { return nil }
func (memoryDisk) Close() error                                { return nil }

func benchmarkAppend(b *testing.B, o Options, parallel int) {
	l := mustOpen(b, filepath.Join(b.TempDir(), "log"), o)
	e := entry(0)
	b.SetParallelism(parallel)
	b.ReportAllocs()
	b.ResetTimer()
	before := processorTime(b)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := l.Append(context.Background(), e); err != nil {
				b.Error(err)
			}
		}
	})
	b.ReportMetric(float64((processorTime(b)-before).Nanoseconds())/float64(b.N), "cpu-ns/op")
}

// processorTime returns what the process has used, system time included.
func processorTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkEntryMarshal(b *testing.B) {
	e := entry(0)
	b.ReportAllocs()
	for b.Loop() {
		e.Marshal()
	}
}

func BenchmarkAppendNoDisk(b *testing.B) { benchmarkAppend(b, Options{disk: memoryDisk{}}, 64) }
func BenchmarkAppendDisk1(b *testing.B)  { benchmarkAppend(b, Options{}, 1) }

// With -cpu 2: 16 callers, the operating point of make bench.
func BenchmarkAppendDisk16(b *testing.B)   { benchmarkAppend(b, Options{}, 8) }
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
		frames = appendFrame(frames, entry(i).Marshal(), 0)
	}
	if _, err := f.WriteAt(frames, int64(headerSize)); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(frames)))
	for b.Loop() {
		if _, err := ReadLeaves(dir, func(uint64, []byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
